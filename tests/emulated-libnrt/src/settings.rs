//! What kind of machine and runtime is played: version, cores, flags. From the environment first, then from control calls.
#![forbid(unsafe_code)]

/// A runtime version: major, minor, patch, maintenance.
pub(crate) type Version = [u64; 4];

/// The newest runtime that the facts describe.
const NEWEST: Version = [2, 34, 10, 0];

/// Behaviours that can be switched on, by bit, with their names in `EMUNRT_FLAGS`.
pub(crate) mod flag {
    /// `nrt_init` after `nrt_close` gives NRT_CLOSED (some releases) instead of starting afresh.
    pub(crate) const REINIT_AFTER_CLOSE_FAILS: u32 = 1;
    /// dtype numbers of SDK 2.27 and older, whatever the version.
    pub(crate) const LEGACY_DTYPES: u32 = 1 << 1;
    /// x4 tensors are reported at a quarter of their size, whatever the version.
    pub(crate) const X4_QUARTER_SIZE: u32 = 1 << 2;
    /// FP8 tensors are reported as INT8.
    pub(crate) const FP8_AS_INT8: u32 = 1 << 3;
    /// Core -1 at load goes round the visible cores; without it, to core 0.
    pub(crate) const AUTO_VNC: u32 = 1 << 4;
    /// Every execution takes the configured delay.
    pub(crate) const SLOW_EXEC: u32 = 1 << 5;
    /// Tensor info: no tensors.
    pub(crate) const INFO_COUNT_ZERO: u32 = 1 << 6;
    /// Tensor info: a count that no model has.
    pub(crate) const INFO_COUNT_ABSURD: u32 = 1 << 7;
    /// Tensor info: ndim that no tensor has.
    pub(crate) const INFO_NDIM_ABSURD: u32 = 1 << 8;
    /// Tensor info: ndim 0 with a null shape.
    pub(crate) const INFO_NDIM_ZERO: u32 = 1 << 9;
    /// Tensor info: names of 256 bytes without a NUL.
    pub(crate) const INFO_NAME_UNTERMINATED: u32 = 1 << 10;
    /// Tensor info: success with a null pointer.
    pub(crate) const INFO_NULL: u32 = 1 << 11;
    /// Tensor info: dtype 0.
    pub(crate) const INFO_DTYPE_UNKNOWN: u32 = 1 << 12;
    /// `nrt_get_version` fills its char arrays without a NUL.
    pub(crate) const VERSION_UNTERMINATED: u32 = 1 << 13;
    /// Executions panic inside the library.
    pub(crate) const EXEC_PANICS: u32 = 1 << 14;
    /// `quantize_mx` takes the older published block scale.
    pub(crate) const OCP_SCALES: u32 = 1 << 15;

    /// All of them by name.
    pub(crate) const NAMES: [(&str, u32); 16] = [
        ("reinit_after_close_fails", REINIT_AFTER_CLOSE_FAILS),
        ("legacy_dtypes", LEGACY_DTYPES),
        ("x4_quarter_size", X4_QUARTER_SIZE),
        ("fp8_as_int8", FP8_AS_INT8),
        ("auto_vnc", AUTO_VNC),
        ("slow_exec", SLOW_EXEC),
        ("info_count_zero", INFO_COUNT_ZERO),
        ("info_count_absurd", INFO_COUNT_ABSURD),
        ("info_ndim_absurd", INFO_NDIM_ABSURD),
        ("info_ndim_zero", INFO_NDIM_ZERO),
        ("info_name_unterminated", INFO_NAME_UNTERMINATED),
        ("info_null", INFO_NULL),
        ("info_dtype_unknown", INFO_DTYPE_UNKNOWN),
        ("version_unterminated", VERSION_UNTERMINATED),
        ("exec_panics", EXEC_PANICS),
        ("ocp_scales", OCP_SCALES),
    ];
}

/// What is played.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    pub(crate) version: Version,
    /// Cores on the instance.
    pub(crate) total: u32,
    /// Cores of this process.
    pub(crate) visible: u32,
    pub(crate) flags: u32,
    /// 2, 3: Trainium2, Trainium3; 0: runs programs for any.
    pub(crate) chip: u32,
    /// Bytes of device memory of each core.
    pub(crate) memory: u64,
    /// Milliseconds that an execution takes with [`flag::SLOW_EXEC`].
    pub(crate) delay: u64,
    /// Physical cores to a logical one that the process was configured for; 0 if it was not.
    pub(crate) lnc: u32,
    /// Whether the payload of a NEFF is hashed at load.
    pub(crate) validate_hash: bool,
    /// Whether NaN in an output was asked to fail the execution.
    pub(crate) nan_fails: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            version: NEWEST,
            total: 2,
            visible: 2,
            flags: 0,
            chip: 0,
            memory: 1 << 30,
            delay: 20,
            lnc: 0,
            validate_hash: false,
            nan_fails: false,
        }
    }
}

impl Settings {
    /// The settings that the environment asks for, and what in it was not understood.
    pub(crate) fn from_env(get: &dyn Fn(&str) -> Option<String>) -> (Settings, Vec<String>) {
        let mut settings = Settings::default();
        let mut problems = vec![];
        let mut read = |name: &str, apply: &mut dyn FnMut(&str) -> Option<()>| {
            if let Some(text) = get(name).filter(|t| !t.is_empty())
                && apply(&text).is_none()
            {
                problems.push(format!("{name}={text} was not understood and is ignored"));
            }
        };
        read("EMUNRT_VERSION", &mut |t| parse_version(t).map(|v| settings.version = v));
        read("EMUNRT_CORES", &mut |t| {
            let (total, visible) = t.split_once(':').unwrap_or((t, t));
            (settings.total, settings.visible) = (total.parse().ok()?, visible.parse().ok()?);
            Some(())
        });
        read("EMUNRT_FLAGS", &mut |t| parse_flags(t).map(|f| settings.flags = f));
        read("EMUNRT_CHIP", &mut |t| parse_chip(t).map(|c| settings.chip = c));
        read("EMUNRT_MEMORY", &mut |t| t.parse().ok().map(|m| settings.memory = m));
        read("EMUNRT_DELAY_MS", &mut |t| t.parse().ok().map(|d| settings.delay = d));
        // The runtime's own variables: VISIBLE_CORES wins over NUM_CORES; both only narrow what is there.
        let total = settings.visible;
        read("NEURON_RT_NUM_CORES", &mut |t| {
            let n: u32 = t.parse().ok()?;
            settings.visible = if n == 0 { total } else { n.min(total) };
            Some(())
        });
        read("NEURON_RT_VISIBLE_CORES", &mut |t| count_cores(t).map(|n| settings.visible = n.min(total)));
        read("NEURON_LOGICAL_NC_CONFIG", &mut |t| t.parse().ok().map(|n| settings.lnc = n));
        settings.validate_hash = get("NEURON_RT_VALIDATE_HASH").is_some_and(|t| t == "true");
        settings.nan_fails = get("NEURON_FAIL_ON_NAN").is_some_and(|t| t == "1")
            || get("NEURON_RT_NUMERICAL_ERRORS_VERBOSITY").is_some_and(|t| t == "critical");
        (settings, problems)
    }

    /// Whether a flag is set.
    pub(crate) fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Whether tensors of 4 GiB and more lose their upper bits (before 2.30.50).
    pub(crate) fn truncates_sizes(&self) -> bool {
        self.version < [2, 30, 50, 0]
    }

    /// Whether x4 tensors are reported at a quarter of their size (before 2.33).
    pub(crate) fn quarters_x4(&self) -> bool {
        self.version < [2, 33, 0, 0] || self.has(flag::X4_QUARTER_SIZE)
    }

    /// Whether dtypes have the numbers of SDK 2.27 and older.
    pub(crate) fn legacy_dtypes(&self) -> bool {
        self.version < [2, 30, 0, 0] || self.has(flag::LEGACY_DTYPES)
    }

    /// Whether `nrt_unload` hides a failed stop (before 2.28.19).
    pub(crate) fn unload_always_succeeds(&self) -> bool {
        self.version < [2, 28, 19, 0]
    }

    /// Whether closing with a model that failed frees it twice (before 2.31.24).
    pub(crate) fn double_frees_failed_models(&self) -> bool {
        self.version < [2, 31, 24, 0]
    }

    /// Whether NaN in an output fails the execution (always before 2.27.23; later when asked for).
    pub(crate) fn fails_on_nan(&self) -> bool {
        self.nan_fails || self.version < [2, 27, 23, 0]
    }

    /// Whether `nrt_instance_info_t` has its char arrays (SDK 2.28).
    pub(crate) fn has_arch_name(&self) -> bool {
        self.version >= [2, 30, 0, 0]
    }
}

/// `2.31.24.0`; missing numbers are 0.
fn parse_version(text: &str) -> Option<Version> {
    let mut version = [0; 4];
    for (i, part) in text.split('.').enumerate() {
        *version.get_mut(i)? = part.parse().ok()?;
    }
    Some(version)
}

fn parse_flags(text: &str) -> Option<u32> {
    text.split(',').try_fold(0, |flags, word| {
        let (_, bit) = flag::NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(word.trim()))?;
        Some(flags | bit)
    })
}

fn parse_chip(text: &str) -> Option<u32> {
    match text {
        "any" => Some(0),
        "trn2" => Some(2),
        "trn3" => Some(3),
        _ => None,
    }
}

/// Cores in `0`, `3-6` or `3-5,6`.
fn count_cores(text: &str) -> Option<u32> {
    text.split(',').try_fold(0u32, |n, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        n.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> (Settings, Vec<String>) {
        Settings::from_env(&|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).into()))
    }

    #[test]
    fn the_environment_is_read_and_nonsense_is_named() {
        let (got, problems) = settings(&[
            ("EMUNRT_VERSION", "2.31.24"),
            ("EMUNRT_CORES", "16:8"),
            ("EMUNRT_FLAGS", "auto_vnc,SLOW_EXEC"),
            ("EMUNRT_CHIP", "trn2"),
            ("NEURON_RT_VISIBLE_CORES", "3-5,6"),
        ]);
        let flags = flag::AUTO_VNC | flag::SLOW_EXEC;
        assert_eq!(problems, [""; 0]);
        assert_eq!((got.version, got.total, got.visible), ([2, 31, 24, 0], 16, 4));
        assert_eq!((got.flags, got.chip), (flags, 2));
        let (got, problems) =
            settings(&[("EMUNRT_CORES", "many"), ("EMUNRT_FLAGS", "fast"), ("EMUNRT_VERSION", "1.2.3.4.5")]);
        assert_eq!((got, problems.len()), (Settings::default(), 3));
    }
}
