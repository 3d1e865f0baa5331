//! The machine without its devices: processor, memory, limits, ports, clock, folder.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::statvfs::statvfs;
use phalanx_kernels::cpu::Isa;
use time::OffsetDateTime;

use super::{Check, Doctor, gib};
use crate::agent::node;

/// Ports of a head, with the flags that change them.
const PORTS: [(u16, &str, &str); 3] =
    [(8001, "cluster", "--port"), (8000, "HTTP", "--http-port"), (8265, "dashboard", "--dashboard-port")];
/// Open files that a head or an agent with many clients needs.
const FILES_MIN: u64 = 4096;
/// Shared memory that NCCL takes between the processes of one machine.
const SHM_BYTES_MIN: u64 = 1 << 30;
/// Room for logs and compiled device code.
const DISK_BYTES_MIN: u64 = 1 << 30;
/// A clock before this instant (2026-01-01) was never set.
const CLOCK_MIN: Duration = Duration::from_secs(1_767_225_600);
/// Sources of time that cost tens of nanoseconds to read.
const FAST_CLOCKS: [&str; 5] = ["tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter", "xen"];

pub(super) fn examine(doctor: &Doctor, report: &mut dyn FnMut(Check)) {
    report(processor());
    report(memory());
    report(shared_memory());
    report(open_files(&std::fs::read_to_string("/proc/self/limits").unwrap_or_default()));
    report(home(doctor.config.home.path()));
    report(clock(SystemTime::now(), &read("/sys/devices/system/clocksource/clocksource0/current_clocksource")));
    let head = std::fs::read_to_string(doctor.config.home.run_dir().join("head.json")).unwrap_or_default();
    for (port, purpose, flag) in PORTS {
        let free = TcpListener::bind(("127.0.0.1", port)).map(drop).map_err(|error| error.to_string());
        report(port_check(port, purpose, flag, free, &head));
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

fn processor() -> Check {
    let found =
        format!("{}, {} threads may be used, kernels for {}", node::cpu_name(), node::num_cpus(), Isa::detect().name());
    if Isa::available().len() > 1 {
        return Check::ok("processor", found);
    }
    let fix = "kernels are several times slower without AVX2; a virtual machine may be given the host's instructions";
    Check::warn("processor", found, fix)
}

fn memory() -> Check {
    let text = read("/proc/meminfo");
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
    };
    Check::ok("memory", format!("{} available of {}", gib(of("MemAvailable:")), gib(of("MemTotal:"))))
}

fn shared_memory() -> Check {
    let name = "/dev/shm";
    match statvfs(Path::new(name)) {
        Ok(found) => {
            let bytes = found.blocks() * found.fragment_size();
            if bytes >= SHM_BYTES_MIN {
                return Check::ok(name, gib(bytes));
            }
            let fix =
                "NCCL between the processes of this machine may need more: docker run --shm-size=1g, or --ipc=host";
            Check::warn(name, gib(bytes), fix)
        }
        Err(error) => Check::warn(name, error.to_string(), "mount a tmpfs there: NCCL needs it between processes"),
    }
}

/// `limits`: the kernel's table of this process.
fn open_files(limits: &str) -> Check {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap_or_default();
    let mut numbers = line.split_whitespace().map(|word| word.parse::<u64>().unwrap_or(u64::MAX));
    let Some(soft) = numbers.next() else {
        return Check::warn("open files", "the kernel does not say", "see `ulimit -n`");
    };
    let hard = numbers.next().unwrap_or(soft);
    let shown = |limit: u64| if limit == u64::MAX { "no limit".to_owned() } else { limit.to_string() };
    let found = format!("{} (at most {})", shown(soft), shown(hard));
    if soft >= FILES_MIN {
        return Check::ok("open files", found);
    }
    Check::warn(
        "open files",
        found,
        format!("many clients need more: ulimit -n 65536, or LimitNOFILE=65536 in a unit ({FILES_MIN} is little)"),
    )
}

fn home(path: &Path) -> Check {
    let name = "home";
    let shown = path.display();
    let mark = path.join(format!(".doctor-{}", std::process::id()));
    let written = std::fs::create_dir_all(path)
        .and_then(|()| std::fs::write(&mark, b""))
        .and_then(|()| std::fs::remove_file(&mark));
    if let Err(error) = written {
        return Check::fail(name, format!("{shown} cannot be written: {error}"), "PHALANX_HOME names another folder");
    }
    let free = statvfs(path).map_or(u64::MAX, |found| found.blocks_available() * found.fragment_size());
    if free < DISK_BYTES_MIN {
        return Check::warn(name, format!("{shown}, {} free", gib(free)), "make room, or move PHALANX_HOME");
    }
    Check::ok(name, format!("{shown}, {} free", gib(free)))
}

fn clock(now: SystemTime, source: &str) -> Check {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let found = format!("{} UTC, source {}", date(since.as_secs()), if source.is_empty() { "unknown" } else { source });
    if since < CLOCK_MIN {
        return Check::fail(
            "clock",
            found,
            "set it (chrony or systemd-timesyncd): certificates between machines need it",
        );
    }
    if !source.is_empty() && !FAST_CLOCKS.contains(&source) {
        let fix = format!(
            "{source} is slow to read, and each step reads it: boot with clocksource=tsc if the machine allows"
        );
        return Check::warn("clock", found, fix);
    }
    Check::ok("clock", found)
}

/// `2026-02-03 04:05:06` of seconds since 1970, in UTC; a clock beyond the calendar is at its beginning.
fn date(seconds: u64) -> String {
    let at = OffsetDateTime::from_unix_timestamp(seconds.cast_signed()).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let (month, day) = (u8::from(at.month()), at.day());
    format!("{}-{month:02}-{day:02} {:02}:{:02}:{:02}", at.year(), at.hour(), at.minute(), at.second())
}

/// `head`: the record of this home's head, empty where none runs.
fn port_check(port: u16, purpose: &str, flag: &str, free: Result<(), String>, head: &str) -> Check {
    let name = format!("port {port}");
    match free {
        Ok(()) => Check::ok(name, format!("free ({purpose})")),
        Err(_) if head.contains(&format!(":{port}\"")) => {
            Check::ok(name, format!("held by the head of this home ({purpose})"))
        }
        Err(reason) => {
            Check::warn(name, format!("{purpose}: {reason}"), format!("{flag} takes another one, 0 any free one"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn dates_read_as_people_write_them() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_827_696), "2000-02-29 12:34:56");
        assert_eq!(date(CLOCK_MIN.as_secs()), "2026-01-01 00:00:00");
    }

    #[test]
    fn clocks_that_were_never_set_fail_and_slow_ones_warn() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let now = CLOCK_MIN.as_secs() + 5;
        assert_eq!(clock(at(1000), "tsc").state, State::Fail);
        assert_eq!(clock(at(now), "hpet").state, State::Warn);
        assert_eq!(clock(at(now), "tsc").state, State::Ok);
        assert_eq!(clock(at(now), "").state, State::Ok);
    }

    #[test]
    fn limits_are_read_from_the_kernels_table() {
        let table =
            |soft| format!("Limit  Soft Limit  Hard Limit  Units\nMax open files            {soft}  524288  files\n");
        assert_eq!(open_files(&table("1024")).state, State::Warn);
        let check = open_files(&table("65536"));
        assert_eq!((check.state, check.found.as_str()), (State::Ok, "65536 (at most 524288)"));
        assert_eq!(open_files(&table("unlimited")).state, State::Ok);
        assert_eq!(open_files("").state, State::Warn);
    }

    #[test]
    fn a_port_of_our_own_head_is_no_fault() {
        let taken = || Err("Address already in use".to_owned());
        assert_eq!(port_check(8000, "HTTP", "--http-port", Ok(()), "").state, State::Ok);
        let other = port_check(8000, "HTTP", "--http-port", taken(), "");
        assert!(other.state == State::Warn && other.fix.contains("--http-port"));
        let head = r#"{"http": "http://127.0.0.1:8000", "local_address": "127.0.0.1:8001"}"#;
        assert_eq!(port_check(8000, "HTTP", "--http-port", taken(), head).state, State::Ok);
        assert_eq!(port_check(8265, "dashboard", "--dashboard-port", taken(), head).state, State::Warn);
    }

    #[test]
    fn this_machine_can_be_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(home(&folder.path().join("new")).state, State::Ok);
        assert_eq!(home(Path::new("/proc/nowhere")).state, State::Fail);
        assert!(memory().found.contains("GiB") && processor().found.contains("threads"));
        shared_memory();
    }
}
