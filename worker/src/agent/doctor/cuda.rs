//! NVIDIA devices: driver, libraries, each device alone.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nccl_rs::{Library, Search, Vendor};
use phalanx_kernels::cuda::{self, Device, LibraryReport};
use serde_json::json;

use super::{Check, Doctor, gib};

/// Longest that the checks of one device may take; device code may have to be compiled.
const DEVICE_DEADLINE: Duration = Duration::from_secs(300);
/// Time between two looks at the process that checks a device.
const PAUSE: Duration = Duration::from_millis(50);
/// PCI's number for NVIDIA, and the beginning of the classes of display and accelerator devices.
const VENDOR: &str = "0x10de";
const DISPLAY_CLASSES: [&str; 2] = ["0x0300", "0x0302"];

/// Checks everything about each device alone, and gives the usable ones.
pub(super) fn examine(doctor: &Doctor, report: &mut dyn FnMut(Check)) -> Vec<Device> {
    let config = &doctor.config;
    if let Some(home) = &config.cuda_home {
        cuda::search_also(cuda::toolkit_folders(home));
    }
    let libraries = cuda::libraries();
    let devices = cuda::devices();
    let num_on_bus = count_on_bus(Path::new("/sys/bus/pci/devices"));
    let visible = config.cuda_visible.as_deref();
    let found = devices.as_ref().map(Vec::len).map_err(ToString::to_string);
    report(presence(found, num_on_bus, visible));
    let devices = devices.unwrap_or_default();
    if devices.is_empty() {
        return devices;
    }
    for library in &libraries {
        report(library_check(library));
    }
    report(driver());
    report(nccl());
    let built = if cuda::has_images() { "in this program" } else { "compiled on this machine at first use, and kept" };
    report(Check::ok("device code", format!("{} ({built})", cuda::build_line())));
    devices.into_iter().filter(|device| examine_device(doctor, device, report)).collect()
}

/// NVIDIA's devices on the PCI bus, whatever drivers there are.
fn count_on_bus(folder: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let is = |path: &Path, file, wanted: &[&str]| {
        let text = std::fs::read_to_string(path.join(file)).unwrap_or_default();
        wanted.iter().any(|wanted| text.starts_with(wanted))
    };
    let is_ours = |path: &Path| is(path, "vendor", &[VENDOR]) && is(path, "class", &DISPLAY_CLASSES);
    entries.flatten().filter(|entry| is_ours(&entry.path())).count()
}

fn presence(found: Result<usize, String>, num_on_bus: usize, visible: Option<&str>) -> Check {
    let name = "NVIDIA devices";
    let hidden = visible.map(|list| format!(", CUDA_VISIBLE_DEVICES is {list:?}")).unwrap_or_default();
    match found {
        Ok(count) if count > 0 => Check::ok(name, format!("{count} visible, {num_on_bus} on the PCI bus{hidden}")),
        Ok(_) if visible.is_some() && num_on_bus > 0 => Check::warn(
            name,
            format!("0 visible of {num_on_bus}{hidden}"),
            "unset CUDA_VISIBLE_DEVICES, or name a device there",
        ),
        Ok(_) if num_on_bus > 0 => {
            let fix = "look at `nvidia-smi` and `dmesg`; in a container, start it with --gpus all";
            Check::fail(name, format!("the driver sees none of {num_on_bus} on the PCI bus"), fix)
        }
        Err(reason) if num_on_bus > 0 => {
            let fix = "install NVIDIA's driver 525 or newer; in a container, start it with --gpus all";
            Check::fail(name, format!("{num_on_bus} on the PCI bus, and {reason}"), fix)
        }
        Ok(_) | Err(_) => Check::ok(name, "no GPU on this machine: the CPU serves"),
    }
}

fn library_check(library: &LibraryReport) -> Check {
    match &library.found {
        Ok(found) => Check::ok(library.name, format!("{} at {}", found.version, found.path.display())),
        Err(reason) => {
            let (is_needed, package) = match library.name {
                "cuBLASLt" => (true, "libcublas-13-0 or libcublas-12-8"),
                "NVRTC" => (!cuda::has_images(), "cuda-nvrtc-13-0 or cuda-nvrtc-12-8"),
                _ => (true, "the driver"),
            };
            let found = format!("needed for {}: {reason}", library.purpose);
            let fix = format!("install {package} (NVIDIA's repository), or let CUDA_HOME name a toolkit");
            if is_needed { Check::fail(library.name, found, fix) } else { Check::warn(library.name, found, fix) }
        }
    }
}

fn driver() -> Check {
    match cuda::driver_release() {
        Ok(found) => Check::ok("driver release", format!("{} ({})", found.version, found.path.display())),
        Err(error) => Check::warn(
            "driver release",
            error.to_string(),
            "libnvidia-ml.so.1 comes with the driver; only `doctor` misses it",
        ),
    }
}

fn nccl() -> Check {
    match Library::open(&Search { vendor: Some(Vendor::Nccl), folders: Vec::new() }) {
        Ok(library) => Check::ok("NCCL", format!("{} at {}", library.version(), library.path().display())),
        Err(error) => {
            let fix = "install libnccl2: groups across machines, and devices without peer access, need it";
            Check::warn("NCCL", error.to_string(), fix)
        }
    }
}

/// Whether the device can be used.
fn examine_device(doctor: &Doctor, device: &Device, report: &mut dyn FnMut(Check)) -> bool {
    let name = format!("device {}", device.ordinal);
    let (major, minor) = device.capability;
    let found = format!(
        "{}, {}, compute capability {major}.{minor}, {}, {} multiprocessors, PCI {}",
        device.uuid,
        device.name,
        gib(device.total_bytes),
        device.num_multiprocessors,
        device.pci_bus_id
    );
    let data = json!({
        "ordinal": device.ordinal, "uuid": device.uuid, "name": device.name, "compute_capability": [major, minor],
        "memory_bytes": device.total_bytes, "multiprocessors": device.num_multiprocessors, "pci_bus_id": device.pci_bus_id,
    });
    let has_bfloat16 = device.has_bfloat16();
    let check = if has_bfloat16 {
        Check::ok(&name, found)
    } else {
        Check::warn(&name, found, "it lacks bfloat16: checkpoints of that type are served in float16")
    };
    report(check.with_data(data));
    let checked = self_check(doctor, device);
    let is_usable = checked.is_ok();
    report(match checked {
        Ok(num) => Check::ok(format!("{name} works"), format!("{num} checks")),
        Err(reason) => {
            let fix =
                format!("`worker cuda-check --device {}` shows all of them; see `dmesg` for Xid lines", device.ordinal);
            Check::fail(format!("{name} works"), reason, fix)
        }
    });
    is_usable
}

/// Runs this program's checks of a device in a process of its own; the number of checks, or the failed ones.
fn self_check(doctor: &Doctor, device: &Device) -> Result<usize, String> {
    let mut command = Command::new(&doctor.program);
    command.args(["cuda-check", "--quick", "--device", &device.ordinal.to_string(), "--home"]);
    command.arg(doctor.config.home.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    let started = Instant::now();
    // Its lines fit the pipes, so it never waits for a reader.
    while child.try_wait().map_err(|error| error.to_string())?.is_none() {
        if started.elapsed() > DEVICE_DEADLINE {
            // Whatever holds it, nothing of it may stay.
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("the checks have not ended within {DEVICE_DEADLINE:?}"));
        }
        std::thread::sleep(PAUSE);
    }
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    verdict(&String::from_utf8_lossy(&output.stdout), &String::from_utf8_lossy(&output.stderr), output.status.success())
}

fn verdict(stdout: &str, stderr: &str, has_succeeded: bool) -> Result<usize, String> {
    let failed: Vec<&str> = stdout.lines().filter_map(|line| line.strip_prefix("FAIL")).map(str::trim).collect();
    match (failed.is_empty(), has_succeeded) {
        (true, true) => Ok(stdout.lines().filter(|line| line.starts_with("ok")).count()),
        (false, _) => Err(failed.join("; ")),
        (true, false) => Err(format!("the process that checks it ended early: {}", stderr.trim())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_is_no_fault_and_one_without_a_driver_is() {
        let no_driver = || Err("CUDA driver cannot be used: no libcuda.so.1".to_owned());
        assert_eq!(presence(no_driver(), 0, None).state, State::Ok);
        assert_eq!(presence(no_driver(), 0, None).found, "no GPU on this machine: the CPU serves");
        assert_eq!(presence(no_driver(), 2, None).state, State::Fail);
        assert_eq!(presence(Ok(0), 2, None).state, State::Fail);
        assert_eq!(presence(Ok(0), 2, Some("")).state, State::Warn);
        assert_eq!(presence(Ok(2), 2, Some("0,1")).state, State::Ok);
    }

    #[test]
    fn devices_on_the_bus_are_counted_without_a_driver() {
        let folder = tempfile::tempdir().unwrap();
        for (name, vendor, class) in
            [("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x8086", "0x030000")]
        {
            let path = folder.path().join(name);
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("vendor"), format!("{vendor}\n")).unwrap();
            std::fs::write(path.join("class"), format!("{class}\n")).unwrap();
        }
        assert_eq!(count_on_bus(folder.path()), 1);
        assert_eq!(count_on_bus(Path::new("/nowhere")), 0);
    }

    #[test]
    fn the_lines_of_a_device_become_a_verdict() {
        assert_eq!(verdict("ok    a: b\nok    c: d\n", "", true), Ok(2));
        assert_eq!(verdict("ok    a: b\nFAIL  graph: broken\n", "", false), Err("graph: broken".into()));
        assert!(verdict("", "error: x", false).unwrap_err().contains("error: x"));
    }

    #[test]
    fn a_missing_library_names_what_to_install() {
        let missing = |name| LibraryReport { name, purpose: "matrix products", found: Err("no file".into()) };
        let check = library_check(&missing("cuBLASLt"));
        assert!(check.state == State::Fail && check.fix.contains("libcublas"), "{check:?}");
        assert!(library_check(&missing("NVRTC")).state >= State::Warn);
    }
}
