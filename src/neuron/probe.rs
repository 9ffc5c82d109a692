//! Can this process run kernels on a device, and if not, why and what to do. Initialises nothing and takes no core.
#![forbid(unsafe_code)]

use super::environment::{self, Variable};
use super::error::NeuronError;
use super::load::{Library, LoadOptions, Origin};
use super::runtime::is_forked_child;
use super::{Status, Version};
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

/// What to look at.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProbeOptions {
    /// Which library.
    pub library: LoadOptions,
    /// Where the device nodes are: `/dev`.
    pub dev_root: PathBuf,
    /// Where the driver tells about devices: `/sys`.
    pub sysfs_root: PathBuf,
    /// Whether a machine without device nodes is not looked at further. The runtime cannot work without them, and counting
    /// cores there prints an error of its own; an emulated library needs none.
    pub require_device_nodes: bool,
    /// An older runtime is refused. Without one, any is taken, and old ones are warned of.
    pub min_version: Option<Version>,
}

impl Default for ProbeOptions {
    fn default() -> Self {
        ProbeOptions {
            library: LoadOptions::default(),
            dev_root: "/dev".into(),
            sysfs_root: "/sys".into(),
            require_device_nodes: true,
            min_version: None,
        }
    }
}

/// The answer. Its text is one sentence; [`Verdict::remedy`] is what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// The runtime can be initialised. (Whether the cores are free only initialising tells.)
    Ready {
        /// Logical cores of the instance.
        total: u32,
        /// Those this process may use.
        visible: u32,
        /// The runtime's version.
        version: Version,
    },
    /// libnrt exists for 64-bit Linux only.
    NotLinux,
    /// `TRN_KERNELS_NEURON=0`.
    DisabledByEnv,
    /// This process was forked from one that uses the device.
    ForkedChild,
    /// The device was lost to this process.
    RuntimePoisoned,
    /// No `/dev/neuron*`.
    NoDeviceNodes {
        /// Where they should be.
        dev_root: PathBuf,
    },
    /// A device node that this user may not open.
    DevicePermission {
        /// The node.
        path: PathBuf,
    },
    /// No library.
    LibraryNotFound {
        /// Where it was looked for.
        tried: Vec<String>,
    },
    /// A library that does not load.
    LibraryUnloadable {
        /// The file.
        path: String,
        /// The linker's words.
        dlerror: String,
    },
    /// A library that is not a libnrt, or not one this crate knows.
    MissingSymbols {
        /// The file.
        path: String,
        /// What it lacks.
        names: Vec<&'static str>,
    },
    /// Older than [`ProbeOptions::min_version`].
    RuntimeTooOld {
        /// Its version.
        found: Version,
        /// What was asked for.
        min: Version,
    },
    /// The library cannot tell its version or count its cores.
    CountFailed {
        /// The function.
        op: &'static str,
        /// Its answer.
        status: Status,
    },
    /// There are cores, and none for this process.
    NoVisibleCores {
        /// Logical cores of the instance.
        total: u32,
    },
}

impl Verdict {
    /// Whether the runtime can be initialised.
    pub fn is_ready(&self) -> bool {
        matches!(self, Verdict::Ready { .. })
    }

    /// What to do about it, in one sentence.
    pub fn remedy(&self) -> &'static str {
        match self {
            Verdict::Ready { .. } => "Initialise the runtime when you want the cores.",
            Verdict::NotLinux => "Use the CPU backend here, and a Trn instance for the device.",
            Verdict::DisabledByEnv => "Unset TRN_KERNELS_NEURON to use the device.",
            Verdict::ForkedChild => "Start workers with spawn or exec, or initialise the device after the fork.",
            Verdict::RuntimePoisoned => "Restart this process.",
            Verdict::NoDeviceNodes { .. } => {
                "On a Trn or Inf2 instance install aws-neuronx-dkms; in a container pass the nodes in (--device=/dev/neuron0)."
            }
            Verdict::DevicePermission { .. } => {
                "Add this user to the node's group, or give the container the device with read and write."
            }
            Verdict::LibraryNotFound { .. } => {
                "Install aws-neuronx-runtime-lib, or set TRN_KERNELS_LIBNRT to the path of libnrt.so.1."
            }
            Verdict::LibraryUnloadable { .. } => {
                "Repair what the linker names: a missing dependency, a glibc older than the library needs, or a damaged file."
            }
            Verdict::MissingSymbols { .. } => {
                "Upgrade aws-neuronx-runtime-lib, or point TRN_KERNELS_LIBNRT at a true libnrt."
            }
            Verdict::RuntimeTooOld { .. } => "Upgrade aws-neuronx-runtime-lib.",
            Verdict::CountFailed { .. } => {
                "Rerun with NEURON_RT_LOG_LEVEL=INFO: the cause (driver absent or of the wrong version) is in that log only."
            }
            Verdict::NoVisibleCores { .. } => "Check NEURON_RT_VISIBLE_CORES and NEURON_RT_NUM_CORES.",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Ready { total, visible, version } => {
                write!(f, "Neuron runtime {version} is ready with {visible} of {total} cores.")
            }
            Verdict::NotLinux => f.write_str("The Neuron runtime exists for 64-bit Linux only."),
            Verdict::DisabledByEnv => f.write_str("The device is switched off by TRN_KERNELS_NEURON=0."),
            Verdict::ForkedChild => f.write_str("This process was forked from one that uses the device."),
            Verdict::RuntimePoisoned => f.write_str("The device was lost to this process by an earlier failure."),
            Verdict::NoDeviceNodes { dev_root } => {
                write!(f, "There is no Neuron device: no node called neuron0, neuron1... in {}.", dev_root.display())
            }
            Verdict::DevicePermission { path } => write!(f, "This user may not open {}.", path.display()),
            Verdict::LibraryNotFound { tried } => write!(f, "There is no libnrt.so.1: tried {}.", tried.join(", ")),
            Verdict::LibraryUnloadable { path, dlerror } => write!(f, "{path} does not load: {dlerror}."),
            Verdict::MissingSymbols { path, names } => write!(f, "{path} lacks {}.", names.join(", ")),
            Verdict::RuntimeTooOld { found, min } => write!(f, "Neuron runtime {found} is older than {min}."),
            Verdict::CountFailed { op, status } => {
                write!(f, "The library loads and cannot count cores: {op}: {status}.")
            }
            Verdict::NoVisibleCores { total } => write!(f, "None of the instance's {total} cores is for this process."),
        }
    }
}

/// A device as its node and the driver show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The node.
    pub node: PathBuf,
    /// Its number.
    pub index: u32,
    /// Physical cores, if the driver tells.
    pub core_count: Option<u32>,
    /// Architecture (`arch_type`), if the driver tells.
    pub architecture: Option<String>,
    /// Name (`device_name`), if the driver tells.
    pub name: Option<String>,
    /// Instance type, if the driver tells.
    pub instance_type: Option<String>,
}

/// The library that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The file, or the name it was found by.
    pub path: String,
    /// How.
    pub origin: Origin,
    /// Version and the text behind it, if it was asked and answered.
    pub version: Option<(Version, String)>,
}

/// What was seen, up to what decided the verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeReport {
    /// The answer.
    pub verdict: Verdict,
    /// The library, if it loaded.
    pub library: Option<Found>,
    /// Device nodes, by number.
    pub devices: Vec<Device>,
    /// Variables that matter and are set.
    pub environment: Vec<(Variable, String)>,
    /// What does not prevent anything and should be known.
    pub warnings: Vec<String>,
}

impl fmt::Display for ProbeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.verdict)?;
        writeln!(f, "  {}", self.verdict.remedy())?;
        if let Some(Found { path, origin, version }) = &self.library {
            let version = version.as_ref().map_or_else(String::new, |(v, detail)| format!(", {v} {detail}"));
            writeln!(f, "library: {path} ({origin:?}){}", version.trim_end())?;
        }
        for device in &self.devices {
            write!(f, "device: {}", device.node.display())?;
            let texts = [&device.instance_type, &device.name, &device.architecture];
            texts.into_iter().flatten().try_for_each(|text| write!(f, ", {text}"))?;
            writeln!(f, "{}", device.core_count.map_or_else(String::new, |n| format!(", {n} cores")))?;
        }
        self.environment.iter().try_for_each(|(v, value)| writeln!(f, "{}={value} ({})", v.name, v.effect))?;
        self.warnings.iter().try_for_each(|warning| writeln!(f, "warning: {warning}"))
    }
}

/// Looks, in this order, at: the platform, the switch, this process, device nodes, the library, its symbols, its version, its
/// count of cores. The first that fails is the verdict. Never panics; the device is not initialised and no core is taken. The
/// library, once loaded, stays (see [`Library`]).
pub fn probe(options: &ProbeOptions) -> ProbeReport {
    let mut report = ProbeReport {
        verdict: Verdict::NotLinux,
        library: None,
        devices: devices(options),
        environment: environment::set(),
        warnings: Vec::new(),
    };
    report.verdict = verdict(options, &mut report);
    let set =
        |name: &str| report.environment.iter().any(|(v, value)| v.name == name && !matches!(value.trim(), "" | "0"));
    let asynchronous = set("NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS");
    let rounding = set("NEURON_RT_STOCHASTIC_ROUNDING_EN");
    if asynchronous {
        let variable = "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS";
        report.warnings.push(format!("{variable} is set: Runtime::init will refuse"));
    }
    if rounding {
        report.warnings.push("stochastic rounding is on: results differ from run to run".into());
    }
    report
}

fn verdict(options: &ProbeOptions, report: &mut ProbeReport) -> Verdict {
    let switch = std::env::var_os(super::SWITCH_VARIABLE);
    if !cfg!(all(target_os = "linux", target_pointer_width = "64")) {
        return Verdict::NotLinux;
    }
    if options.library.environment && super::load::is_switched_off(switch.as_deref()) {
        return Verdict::DisabledByEnv;
    }
    if is_forked_child() {
        return Verdict::ForkedChild;
    }
    if options.require_device_nodes {
        if report.devices.is_empty() {
            return Verdict::NoDeviceNodes { dev_root: options.dev_root.clone() };
        }
        if let Some(device) = report.devices.iter().find(|d| !access::may_open(&d.node)) {
            return Verdict::DevicePermission { path: device.node.clone() };
        }
    }
    let library = match Library::open(&options.library) {
        Ok(library) => library,
        Err(e) => return of_error(e),
    };
    if library.is_lost() {
        return Verdict::RuntimePoisoned;
    }
    let found = report.library.insert(Found { path: library.path().into(), origin: library.origin(), version: None });
    let (version, detail) = match library.version() {
        Ok(answer) => answer,
        Err(e) => return of_error(e),
    };
    found.version = Some((version, detail));
    if let Some(min) = options.min_version
        && version < min
    {
        return Verdict::RuntimeTooOld { found: version, min };
    }
    report.warnings.extend(version.warning());
    match library.core_counts() {
        Ok((total, 0)) => Verdict::NoVisibleCores { total },
        Ok((total, visible)) => Verdict::Ready { total, visible, version },
        Err(e) => of_error(e),
    }
}

/// What opening a library, asking its version and counting cores can answer.
fn of_error(e: NeuronError) -> Verdict {
    match e {
        NeuronError::Disabled => Verdict::DisabledByEnv,
        NeuronError::LibraryNotFound { tried } => Verdict::LibraryNotFound { tried },
        NeuronError::LibraryUnloadable { path, dlerror } => Verdict::LibraryUnloadable { path, dlerror },
        NeuronError::MissingSymbols { path, names } => Verdict::MissingSymbols { path, names },
        NeuronError::Call { op, status } => Verdict::CountFailed { op, status },
        NeuronError::ForkedChild => Verdict::ForkedChild,
        _ => Verdict::NotLinux,
    }
}

/// Device nodes with what sysfs tells about them.
fn devices(options: &ProbeOptions) -> Vec<Device> {
    let entries = std::fs::read_dir(&options.dev_root).into_iter().flatten().flatten();
    let numbered = entries.filter_map(|entry| {
        let name = entry.file_name();
        let digits = name.to_str()?.strip_prefix("neuron")?;
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        Some((entry.path(), digits.parse().ok().filter(|_: &u32| plain)?))
    });
    let mut devices: Vec<Device> = numbered
        .map(|(node, index)| {
            let folder = options.sysfs_root.join(format!("devices/virtual/neuron_device/neuron{index}"));
            let info = |name: &str| line(&folder.join("info/architecture").join(name));
            Device {
                node,
                index,
                core_count: line(&folder.join("core_count")).and_then(|text| text.parse().ok()),
                architecture: info("arch_type"),
                name: info("device_name"),
                instance_type: info("instance_type"),
            }
        })
        .collect();
    devices.sort_by_key(|d| d.index);
    devices
}

/// The first line of a small file, if there is one.
fn line(path: &Path) -> Option<String> {
    // Only regular files: opening a pipe would wait for a writer.
    std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    let mut text = Vec::new();
    std::fs::File::open(path).ok()?.take(256).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    text.lines().next().map(|l| l.trim().to_owned()).filter(|l| !l.is_empty())
}

/// Whether this process may read and write a node, found without opening it: opening a device is not for a probe.
#[cfg(target_os = "linux")]
mod access {
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    /// Overrides every mode bit (`linux/capability.h`).
    const CAP_DAC_OVERRIDE: u64 = 1 << 1;

    /// The numbers behind a key of `/proc/self/status`.
    fn numbers(status: &str, key: &str, radix: u32) -> Vec<u64> {
        let line = status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        let words = line.unwrap_or_default().split_whitespace();
        words.filter_map(|w| u64::from_str_radix(w, radix).ok()).collect()
    }

    pub(super) fn may_open(node: &Path) -> bool {
        let Ok(meta) = std::fs::metadata(node) else { return false };
        // A system without /proc cannot be asked: the runtime itself will tell.
        let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return true };
        allows(&status, meta.uid(), meta.gid(), meta.mode())
    }

    /// The kernel's rule: owner, else group, else others; and read and write are needed.
    pub(super) fn allows(status: &str, uid: u32, gid: u32, mode: u32) -> bool {
        // Real, effective, saved, file system: the last decides.
        let last = |key| numbers(status, key, 10).last().copied();
        if numbers(status, "CapEff", 16).first().is_some_and(|caps| caps & CAP_DAC_OVERRIDE != 0) {
            return true;
        }
        let in_group = last("Gid") == Some(gid.into()) || numbers(status, "Groups", 10).contains(&gid.into());
        let shift = if last("Uid") == Some(uid.into()) { 6 } else { 3 * u32::from(in_group) };
        (mode >> shift) & 0o6 == 0o6
    }
}

#[cfg(not(target_os = "linux"))]
mod access {
    pub(super) fn may_open(_node: &std::path::Path) -> bool {
        true
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn options(root: &Path) -> ProbeOptions {
        ProbeOptions {
            library: LoadOptions { path: Some(root.join("libnrt.so.1")), environment: false },
            dev_root: root.join("dev"),
            sysfs_root: root.join("sys"),
            require_device_nodes: true,
            min_version: None,
        }
    }

    #[test]
    fn no_node_no_library_text_file() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        let verdict = || probe(&options).verdict;
        assert_eq!(verdict(), Verdict::NoDeviceNodes { dev_root: options.dev_root.clone() });

        std::fs::create_dir(&options.dev_root).unwrap();
        std::fs::write(options.dev_root.join("neuron_x"), "").unwrap();
        std::fs::write(options.dev_root.join("neuron+1"), "").unwrap();
        assert!(matches!(verdict(), Verdict::NoDeviceNodes { .. }));

        std::fs::write(options.dev_root.join("neuron10"), "").unwrap();
        std::fs::write(options.dev_root.join("neuron2"), "").unwrap();
        let path = dir.path().join("libnrt.so.1");
        assert_eq!(verdict(), Verdict::LibraryNotFound { tried: vec![path.display().to_string()] });

        std::fs::write(&path, "text").unwrap();
        match verdict() {
            Verdict::LibraryUnloadable { dlerror, .. } => assert!(dlerror.contains("libnrt.so.1"), "{dlerror}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn devices_are_listed_by_number_with_what_the_driver_tells() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        std::fs::create_dir(&options.dev_root).unwrap();
        ["neuron10", "neuron2"].iter().for_each(|n| std::fs::write(options.dev_root.join(n), "").unwrap());
        let folder = options.sysfs_root.join("devices/virtual/neuron_device/neuron2");
        std::fs::create_dir_all(folder.join("info/architecture")).unwrap();
        std::fs::write(folder.join("core_count"), "8\n").unwrap();
        std::fs::write(folder.join("info/architecture/arch_type"), "NCv3\n").unwrap();
        std::fs::write(folder.join("info/architecture/device_name"), [0xff; 9000]).unwrap();
        let report = probe(&options);
        let seen: Vec<_> = report.devices.iter().map(|d| (d.index, d.core_count)).collect();
        assert_eq!(seen, [(2, Some(8)), (10, None)]);
        assert_eq!(report.devices[0].architecture.as_deref(), Some("NCv3"));
        assert_eq!(report.devices[0].name.as_ref().map(|n| n.chars().count()), Some(256));
        assert!(report.to_string().contains("NCv3, 8 cores"));
    }

    #[test]
    fn without_a_named_file_every_place_is_listed() {
        let library = LoadOptions { path: None, environment: false };
        let report = probe(&ProbeOptions { library, require_device_nodes: false, ..ProbeOptions::default() });
        match &report.verdict {
            Verdict::LibraryNotFound { tried } => {
                assert!(tried.iter().any(|t| t.contains("/opt/aws/neuron")), "{tried:?}")
            }
            // A machine that has the library.
            Verdict::Ready { .. } | Verdict::CountFailed { .. } | Verdict::NoVisibleCores { .. } => {}
            other => panic!("{other:?}"),
        }
        assert!(report.to_string().contains(report.verdict.remedy()));
    }

    /// Against the mode bits that a plain user meets; a process of root passes by its capability.
    #[test]
    fn nodes_without_permission() {
        let user =
            "Uid:\t1000\t1000\t1000\t1000\nGid:\t100\t100\t100\t100\nGroups:\t4 27 \nCapEff:\t0000000000000000\n";
        let allows = |uid, gid, mode| access::allows(user, uid, gid, mode);
        assert!(!allows(0, 0, 0o20660) && allows(0, 0, 0o20666) && !allows(0, 0, 0o20664));
        assert!(allows(0, 27, 0o20660) && allows(0, 100, 0o20660) && !allows(0, 28, 0o20660));
        assert!(allows(1000, 0, 0o20600) && !allows(1000, 27, 0o20066), "the owner's bits count for the owner");
        let root = user.replace("CapEff:\t0000000000000000", "CapEff:\t000001ffffffffff");
        assert!(access::allows(&root, 5, 5, 0));
    }

    /// In a child process, since the environment belongs to the whole process.
    #[test]
    fn the_switch_is_obeyed() {
        const CHILD: &str = "TRN_KERNELS_TEST_SWITCH_CHILD";
        if std::env::var_os(CHILD).is_some() {
            assert_eq!(probe(&ProbeOptions::default()).verdict, Verdict::DisabledByEnv);
            assert_eq!(Library::open(&LoadOptions::default()), Err(NeuronError::Disabled));
            println!("the switch was obeyed");
            return;
        }
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "neuron::probe::tests::the_switch_is_obeyed", "--nocapture"])
            .env(CHILD, "1")
            .env(super::super::SWITCH_VARIABLE, "0")
            .output()
            .unwrap();
        let out = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && out.contains("the switch was obeyed"), "{out}");
    }
}
