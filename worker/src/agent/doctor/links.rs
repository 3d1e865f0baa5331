//! What devices reach of each other, and how fast: one sum over every pair, against what the link can carry.

use std::path::Path;
use std::time::Duration;

use phalanx_kernels::cuda::{self, Device, PeerAccess};
use phalanx_proto::DeviceKind;
use serde_json::json;

use super::{Check, Doctor};
use crate::reduce_bench::{Measured, Setup, Timing, Ways};

/// Sizes that are measured between a pair: what a token costs, and what a link carries.
const SMALL: usize = 8 << 10;
const LARGE: usize = 64 << 20;
/// The same between processes on CPUs.
const CPU_LARGE: usize = 4 << 20;
/// Longest that one pair may take.
const PAIR_DEADLINE: Duration = Duration::from_secs(180);
/// Share of a link's rate below which something is wrong with it.
const SHARE_MIN: f64 = 0.4;
/// Longest time of a small sum where the devices reach each other's memory.
const SMALL_US_MAX: f64 = 25.0;

/// How two devices are joined.
#[derive(Debug, Clone, PartialEq)]
struct Link {
    words: String,
    /// What it carries in each direction, where that is known.
    gb_per_s: Option<f64>,
    has_access: bool,
}

/// Looks at every pair of devices; on CPUs, at two processes.
pub(super) fn examine(doctor: &Doctor, devices: &[Device], report: &mut dyn FnMut(Check)) {
    if devices.is_empty() {
        report(between_processes(doctor));
        return;
    }
    if devices.len() == 1 {
        report(Check::ok("links", "one device: nothing to join"));
        return;
    }
    let matrix = match cuda::peer_matrix() {
        Ok(matrix) => matrix,
        Err(error) => return report(Check::fail("links", error.to_string(), "look at `nvidia-smi topo -m`")),
    };
    for (index, a) in devices.iter().enumerate() {
        for b in &devices[index + 1..] {
            let access = |from: &Device, to: &Device| {
                matrix.get(from.ordinal as usize).and_then(|row| row.get(to.ordinal as usize)).copied()
            };
            let none = PeerAccess { access: false, native_atomics: false };
            let (there, back) = (access(a, b).unwrap_or(none), access(b, a).unwrap_or(none));
            let link = link(a, b, there, back);
            report(pair(doctor, a, b, &link));
        }
    }
}

fn link(a: &Device, b: &Device, there: PeerAccess, back: PeerAccess) -> Link {
    let has_access = there.access && back.access;
    if there.native_atomics && back.native_atomics {
        let links = |device: &Device| cuda::num_nvlinks(&device.uuid).unwrap_or_default();
        let num = links(a).min(links(b));
        let gb_per_s = nvlink_gb_per_s(a.capability).filter(|_| num > 0).map(|rate| rate * f64::from(num));
        let words = if num > 0 { format!("NVLink ({num} links)") } else { "NVLink".into() };
        return Link { words, gb_per_s, has_access };
    }
    let rate = |device: &Device| pcie_gb_per_s(Path::new("/sys/bus/pci/devices"), &device.pci_bus_id);
    let gb_per_s = rate(a).zip(rate(b)).map(|(a, b)| a.min(b));
    let words = if has_access { "PCIe" } else { "PCIe, without peer access" };
    Link { words: words.into(), gb_per_s, has_access }
}

/// What one NVLink carries in each direction.
fn nvlink_gb_per_s(capability: (u32, u32)) -> Option<f64> {
    match capability {
        (7 | 9, 0) | (8, 0) => Some(25.0),
        (8, 6) => Some(14.0625),
        (10, _) => Some(50.0),
        _ => None,
    }
}

/// What a device's slot carries in each direction. A resting device lowers its speed, so the highest counts.
fn pcie_gb_per_s(folder: &Path, bus_id: &str) -> Option<f64> {
    let read = |file| std::fs::read_to_string(folder.join(bus_id.to_lowercase()).join(file)).ok();
    let speed: f64 = read("max_link_speed")?.split_whitespace().next()?.parse().ok()?;
    let width: f64 = read("max_link_width")?.trim().parse().ok()?;
    // Up to 5 GT/s, 8 of 10 bits are data; beyond, 128 of 130.
    let share = if speed <= 5.0 { 0.8 } else { 128.0 / 130.0 };
    (width > 0.0 && width <= 32.0).then_some(speed * width * share / 8.0)
}

fn pair(doctor: &Doctor, a: &Device, b: &Device, link: &Link) -> Check {
    let name = format!("devices {} and {}", a.ordinal, b.ordinal);
    let slot = |device: &Device| Some(("CUDA_VISIBLE_DEVICES".to_owned(), device.uuid.clone()));
    let setup = setup(doctor, DeviceKind::Cuda, vec![slot(a), slot(b)], vec![SMALL, LARGE]);
    match setup.run(|_| ()) {
        Ok(measured) => judge(name, link, &measured),
        Err(error) => {
            let fix = "devices that cannot exchange serve only apart (--tensor-parallel-size 1); `nvidia-smi topo -m` and `dmesg` may say why";
            Check::fail(name, format!("{}: {error}", link.words), fix)
        }
    }
}

fn setup(doctor: &Doctor, device: DeviceKind, slots: Vec<Option<(String, String)>>, sizes: Vec<usize>) -> Setup {
    Setup {
        program: doctor.program.clone(),
        device,
        slots,
        env: doctor.config.nccl_defaults(),
        ways: Ways::Served,
        sizes,
        kernel_cache_dir: doctor.config.home.kernel_cache_dir(),
        cuda_home: doctor.config.cuda_home.clone(),
        deadline: PAIR_DEADLINE,
    }
}

fn judge(name: String, link: &Link, measured: &Measured) -> Check {
    let of = |bytes| measured.timings.iter().filter(move |timing| timing.bytes == bytes);
    let figures: Vec<String> = of(SMALL).map(|small| figure(small, link, &measured.timings)).collect();
    let rate = link.gb_per_s.map(|rate| format!(", {rate:.0} GB/s each way")).unwrap_or_default();
    let notes: String = measured.notes.iter().map(|note| format!("; {note}")).collect();
    let found = format!("{}{rate}: {}{notes}", link.words, figures.join("; "));
    let data = json!({"link": link.words, "gb_per_s": link.gb_per_s, "peer_access": link.has_access, "timings": measured.timings, "notes": measured.notes});
    let check = if let Some(wrong) = measured.timings.iter().find(|timing| !timing.right) {
        let fix =
            "do not serve on these two together; look for Xid lines in `dmesg`, and test the memory and the links";
        Check::fail(name, format!("{} gives wrong sums. {found}", wrong.way), fix)
    } else if measured.timings.is_empty() {
        Check::fail(name, found, "install libnccl2, or find out why the devices do not reach each other")
    } else {
        let share = of(LARGE).filter_map(|timing| Some(timing.bus_gb_per_s(2) / link.gb_per_s?)).fold(None, most);
        let fastest = of(SMALL).map(|timing| timing.us).fold(f64::INFINITY, f64::min);
        if !link.has_access {
            let fix =
                "sums go through the host: use cards that are joined, or see whether ACS or an IOMMU keeps them apart";
            Check::warn(name, found, fix)
        } else if share.is_some_and(|share| share < SHARE_MIN) {
            Check::warn(
                name,
                found,
                "far below what the link carries: see `nvidia-smi nvlink -s`, and what else uses the devices",
            )
        } else if fastest > SMALL_US_MAX {
            Check::warn(name, found, "small sums are slow: see what else uses the devices or the processors")
        } else {
            Check::ok(name, found)
        }
    };
    check.with_data(data)
}

fn most(a: Option<f64>, b: f64) -> Option<f64> {
    Some(a.map_or(b, |a| a.max(b)))
}

/// What one way took: a small sum, and the large one of the same way against the link.
fn figure(small: &Timing, link: &Link, all: &[Timing]) -> String {
    let large = all.iter().find(|timing| timing.way == small.way && timing.bytes > small.bytes);
    let large = large.map_or_else(String::new, |large| {
        let rate = large.bus_gb_per_s(2);
        let share = link.gb_per_s.map(|link| format!(", {:.0} % of the link", 100.0 * rate / link)).unwrap_or_default();
        format!(", {} MiB {:.0} us ({rate:.1} GB/s{share})", large.bytes >> 20, large.us)
    });
    format!("{} {} KiB {:.1} us{large}", small.way, small.bytes >> 10, small.us)
}

/// On CPUs: two processes, as two ranks would be.
fn between_processes(doctor: &Doctor) -> Check {
    let name = "two processes";
    let setup = setup(doctor, DeviceKind::Cpu, vec![None, None], vec![SMALL, CPU_LARGE]);
    let link = Link { words: "memory of this machine".into(), gb_per_s: None, has_access: true };
    match setup.run(|_| ()) {
        Ok(measured) if measured.timings.iter().all(|timing| timing.right) => {
            let small = measured.timings.iter().filter(|timing| timing.bytes == SMALL);
            let figures: Vec<String> = small.map(|small| figure(small, &link, &measured.timings)).collect();
            Check::ok(name, format!("{}: {}", link.words, figures.join("; ")))
                .with_data(json!({"timings": measured.timings}))
        }
        Ok(_) => Check::fail(name, "their sums are wrong", "test this machine's memory"),
        Err(error) => Check::fail(name, error.to_string(), "tensor parallel on this machine's CPU will not work"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn timing(way: &str, bytes: usize, us: f64, right: bool) -> Timing {
        Timing { way: way.into(), blocks: 0, bytes, us, right }
    }

    fn judged(link: &Link, timings: Vec<Timing>) -> Check {
        judge("devices 0 and 1".into(), link, &Measured { timings, notes: Vec::new() })
    }

    #[test]
    fn a_pair_is_measured_against_its_link() {
        let nvlink = Link { words: "NVLink (18 links)".into(), gb_per_s: Some(450.0), has_access: true };
        let good = judged(&nvlink, vec![timing("own", SMALL, 3.0, true), timing("own", LARGE, 245.0, true)]);
        assert_eq!(
            (good.state, good.found.as_str()),
            (
                State::Ok,
                "NVLink (18 links), 450 GB/s each way: own 8 KiB 3.0 us, 64 MiB 245 us (273.9 GB/s, 61 % of the link)"
            )
        );
        let slow = judged(&nvlink, vec![timing("own", SMALL, 3.0, true), timing("own", LARGE, 2450.0, true)]);
        assert_eq!(slow.state, State::Warn);
        let late = judged(&nvlink, vec![timing("own", SMALL, 90.0, true), timing("own", LARGE, 245.0, true)]);
        assert_eq!(late.state, State::Warn);
        let wrong = judged(&nvlink, vec![timing("own", SMALL, 3.0, true), timing("own", LARGE, 245.0, false)]);
        assert_eq!(wrong.state, State::Fail);
        assert_eq!(judged(&nvlink, Vec::new()).state, State::Fail);
        let host = Link { words: "PCIe, without peer access".into(), gb_per_s: None, has_access: false };
        assert_eq!(judged(&host, vec![timing("nccl", SMALL, 30.0, true)]).state, State::Warn);
    }

    #[test]
    fn a_slot_carries_what_its_lanes_do() {
        let folder = tempfile::tempdir().unwrap();
        let device = folder.path().join("0000:1b:00.0");
        std::fs::create_dir(&device).unwrap();
        std::fs::write(device.join("max_link_speed"), "32.0 GT/s PCIe\n").unwrap();
        std::fs::write(device.join("max_link_width"), "16\n").unwrap();
        let rate = pcie_gb_per_s(folder.path(), "0000:1B:00.0").unwrap();
        assert!((rate - 63.0).abs() < 0.1, "{rate}");
        std::fs::write(device.join("max_link_speed"), "Unknown\n").unwrap();
        assert_eq!(pcie_gb_per_s(folder.path(), "0000:1B:00.0"), None);
    }
}
