//! Which slots this machine offers.
//!
//! **Invariant:** what was asked for by name is offered or refused, never replaced; only `auto` falls back, and says so.

use std::num::NonZeroU32;

use phalanx_proto::DeviceKind;

use crate::config::DeviceChoice;

/// Why no slots can be offered as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The kind is not there.
    #[error("--device {kind}: this machine has none ({reason}); --device cpu or auto works here")]
    Absent {
        /// What was asked for.
        kind: DeviceKind,
        /// How it was seen.
        reason: String,
    },
    /// The kind is there, and this version cannot use it.
    #[error("--device {kind}: this version has no kernels for it; --device cpu or auto works here")]
    NotServed {
        /// What was asked for.
        kind: DeviceKind,
    },
    /// More than there are.
    #[error("--num-gpus {asked}: this machine has {present}")]
    TooMany {
        /// Slots that were asked for.
        asked: u32,
        /// Devices that are there.
        present: u32,
    },
}

/// One slot: what one rank gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSlot {
    /// The device in words.
    pub name: String,
    /// What makes a process see this device only.
    pub env: Option<(&'static str, String)>,
}

/// Everything that this machine offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Devices {
    /// What the slots are.
    pub kind: DeviceKind,
    /// One for each rank that fits; never empty.
    pub slots: Vec<DeviceSlot>,
    /// What a person should know about the choice.
    pub note: Option<String>,
}

/// What the choice is made from.
pub struct Machine<'a> {
    /// Counts devices of a kind, or says why there are none.
    pub count: &'a dyn Fn(DeviceKind) -> Result<u32, String>,
    /// Whether this version can use a kind.
    pub serves: &'a dyn Fn(DeviceKind) -> bool,
    /// The processor's name.
    pub cpu_name: String,
    /// `CUDA_VISIBLE_DEVICES`.
    pub cuda_visible: Option<String>,
    /// `HIP_VISIBLE_DEVICES`.
    pub hip_visible: Option<String>,
}

impl Machine<'_> {
    /// Chooses the slots to offer.
    ///
    /// # Errors
    /// Devices that are not there, cannot be used, or are too few.
    pub fn offer(&self, choice: DeviceChoice, num_slots: Option<NonZeroU32>) -> Result<Devices, DeviceError> {
        match choice {
            DeviceChoice::Only(DeviceKind::Cpu) => Ok(self.cpu(num_slots, None)),
            DeviceChoice::Only(kind) => {
                let present = (self.count)(kind).map_err(|reason| DeviceError::Absent { kind, reason })?;
                if present == 0 {
                    return Err(DeviceError::Absent { kind, reason: "the driver counts 0 devices".into() });
                }
                if !(self.serves)(kind) {
                    return Err(DeviceError::NotServed { kind });
                }
                self.gpus(kind, present, num_slots)
            }
            DeviceChoice::Auto => self.auto(num_slots),
        }
    }

    fn auto(&self, num_slots: Option<NonZeroU32>) -> Result<Devices, DeviceError> {
        let mut unusable = None;
        for kind in [DeviceKind::Cuda, DeviceKind::Rocm] {
            match (self.count)(kind) {
                Ok(present) if present > 0 && (self.serves)(kind) => return self.gpus(kind, present, num_slots),
                Ok(present) if present > 0 => unusable = Some((present, kind)),
                _ => {}
            }
        }
        let num = num_slots.map_or(1, NonZeroU32::get);
        let slots = format!("offering {num} CPU slot{}", if num == 1 { "" } else { "s" });
        let note = match unusable {
            Some((present, kind)) => {
                format!("{present} {kind} devices are here, but this version has no kernels for them: {slots}")
            }
            None => format!("no GPU on this machine: {slots}"),
        };
        Ok(self.cpu(num_slots, Some(note)))
    }

    fn cpu(&self, num_slots: Option<NonZeroU32>, note: Option<String>) -> Devices {
        let slot = DeviceSlot { name: self.cpu_name.clone(), env: None };
        Devices { kind: DeviceKind::Cpu, slots: vec![slot; num_slots.map_or(1, NonZeroU32::get) as usize], note }
    }

    fn gpus(&self, kind: DeviceKind, present: u32, num_slots: Option<NonZeroU32>) -> Result<Devices, DeviceError> {
        let asked = num_slots.map_or(present, NonZeroU32::get);
        if asked > present {
            return Err(DeviceError::TooMany { asked, present });
        }
        let (variable, visible) = match kind {
            DeviceKind::Rocm => ("HIP_VISIBLE_DEVICES", &self.hip_visible),
            _ => ("CUDA_VISIBLE_DEVICES", &self.cuda_visible),
        };
        let named: Vec<&str> = visible.iter().flat_map(|list| list.split(',')).map(str::trim).collect();
        let slots = (0..asked as usize).map(|i| {
            let device = named.get(i).map_or_else(|| i.to_string(), |name| (*name).to_owned());
            DeviceSlot { name: format!("{kind}:{device}"), env: Some((variable, device)) }
        });
        Ok(Devices { kind, slots: slots.collect(), note: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(cuda: u32, served: bool, choice: DeviceChoice, num: u32) -> Result<Devices, DeviceError> {
        let count = |kind| if kind == DeviceKind::Cuda { Ok(cuda) } else { Err("no library".into()) };
        let machine = Machine {
            count: &count,
            serves: &|kind| served || kind == DeviceKind::Cpu,
            cpu_name: "c".into(),
            cuda_visible: Some("3,5".into()),
            hip_visible: None,
        };
        machine.offer(choice, NonZeroU32::new(num))
    }

    #[test]
    fn auto_takes_gpus_else_cpus_and_says_so() {
        let gpus = offer(2, true, DeviceChoice::Auto, 0).unwrap();
        assert_eq!((gpus.kind, gpus.slots.len(), gpus.note), (DeviceKind::Cuda, 2, None));
        assert_eq!(gpus.slots[1].env, Some(("CUDA_VISIBLE_DEVICES", "5".into())));
        let cpus = offer(0, true, DeviceChoice::Auto, 2).unwrap();
        assert_eq!((cpus.kind, cpus.slots.len()), (DeviceKind::Cpu, 2));
        assert_eq!(cpus.note.as_deref(), Some("no GPU on this machine: offering 2 CPU slots"));
        let cpus = offer(2, false, DeviceChoice::Auto, 0).unwrap();
        assert!(cpus.kind == DeviceKind::Cpu && cpus.note.unwrap().contains("2 cuda devices"));
    }

    #[test]
    fn what_is_asked_for_by_name_is_never_replaced() {
        let only = DeviceChoice::Only(DeviceKind::Cuda);
        assert!(matches!(offer(0, true, only, 1), Err(DeviceError::Absent { .. })));
        assert!(matches!(offer(2, false, only, 1), Err(DeviceError::NotServed { .. })));
        assert_eq!(offer(2, true, only, 3), Err(DeviceError::TooMany { asked: 3, present: 2 }));
        assert_eq!(offer(2, true, DeviceChoice::Auto, 3).unwrap_err().to_string(), "--num-gpus 3: this machine has 2");
        assert_eq!(offer(2, true, DeviceChoice::Only(DeviceKind::Cpu), 0).unwrap().slots.len(), 1);
    }
}
