//! Another host on this machine: a network namespace at the end of a cable that can be cut, or be long.
//!
//! The cable is made of two TUN devices and threads that carry packets between them: a cut one loses them without a word to
//! anybody, which no kernel module is needed for.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Largest packet, bytes.
const PACKET_BYTES_MAX: usize = 60_000;
/// Packets that a direction of the cable holds.
const PACKETS_MAX: usize = 4096;
/// The delay of a cable that is cut.
const CUT: u64 = u64::MAX;

/// A namespace whose only way out is the cable to this one; both end with the value.
pub struct FarHost {
    namespace: String,
    devices: [String; 2],
    subnet: u32,
    /// Microseconds that a packet is on its way, one way.
    delay_us: Arc<AtomicU64>,
}

fn ip(arguments: &[&str]) -> bool {
    let quiet = Command::new("ip").args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    quiet.is_ok_and(|status| status.success())
}

impl FarHost {
    /// `None` where this machine lets nobody make namespaces or TUN devices.
    pub fn new() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = (std::process::id() + 97 * NEXT.fetch_add(1, Ordering::Relaxed)) % 250;
        let host = Self {
            namespace: format!("phxfar{id}"),
            devices: [format!("phxn{id}"), format!("phxf{id}")],
            subnet: id,
            delay_us: Arc::default(),
        };
        let name = host.namespace.as_str();
        let [near, far] = &host.devices;
        if !ip(&["netns", "add", name]) || !ip(&["-n", name, "link", "set", "lo", "up"]) {
            return None;
        }
        let (near_end, far_end) = (tun(near)?, tun(far)?);
        let (here, there) = (format!("{}/24", host.address_here()), format!("{}/24", host.address_there()));
        let ready = ip(&["link", "set", far, "netns", name])
            && ip(&["link", "set", near, "mtu", "60000", "up"])
            && ip(&["addr", "add", &here, "dev", near])
            && ip(&["-n", name, "link", "set", far, "mtu", "60000", "up"])
            && ip(&["-n", name, "addr", "add", &there, "dev", far]);
        if !ready {
            return None;
        }
        let (near_copy, far_copy) = (near_end.try_clone().ok()?, far_end.try_clone().ok()?);
        carry(near_end, far_copy, Arc::clone(&host.delay_us));
        carry(far_end, near_copy, Arc::clone(&host.delay_us));
        Some(host)
    }

    /// The namespace.
    pub fn name(&self) -> &str {
        &self.namespace
    }

    /// This host's address on the cable.
    pub fn address_here(&self) -> String {
        format!("10.88.{}.1", self.subnet)
    }

    /// The other host's address on the cable.
    pub fn address_there(&self) -> String {
        format!("10.88.{}.2", self.subnet)
    }

    /// Packets are lost from now on, in both directions; nobody is told.
    pub fn cut(&self) {
        self.delay_us.store(CUT, Ordering::Relaxed);
    }

    /// Packets arrive again, each after so long.
    pub fn connect(&self, one_way: Duration) {
        self.delay_us.store(one_way.as_micros() as u64, Ordering::Relaxed);
    }
}

impl Drop for FarHost {
    fn drop(&mut self) {
        // The threads read from devices that are gone, and end.
        ip(&["link", "del", &self.devices[0]]);
        ip(&["-n", &self.namespace, "link", "del", &self.devices[1]]);
        ip(&["netns", "del", &self.namespace]);
    }
}

/// A TUN device of this name: each read and each write is a packet.
fn tun(name: &str) -> Option<File> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").ok()?;
    // `struct ifreq`: the name, then the flags.
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = libc::IFF_TUN as u16 | libc::IFF_NO_PI as u16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the call reads and writes one `struct ifreq`, which has 40 bytes, and keeps no pointer to it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    (result == 0).then_some(file)
}

/// Carries packets one way until the devices are gone.
fn carry(mut from: File, mut to: File, delay_us: Arc<AtomicU64>) {
    let (packets, on_the_way) = mpsc::sync_channel::<(Instant, Vec<u8>)>(PACKETS_MAX);
    thread::spawn(move || {
        let mut buffer = vec![0; PACKET_BYTES_MAX + 1];
        while let Ok(length) = from.read(&mut buffer) {
            let delay = delay_us.load(Ordering::Relaxed);
            if delay != CUT {
                let due = Instant::now() + Duration::from_micros(delay);
                // A cable that is full loses packets, as cables do.
                let _ = packets.try_send((due, buffer[..length].to_vec()));
            }
        }
    });
    thread::spawn(move || {
        for (due, packet) in on_the_way {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            // A device that is down takes nothing; TCP sends again.
            let _ = to.write(&packet);
        }
    });
}
