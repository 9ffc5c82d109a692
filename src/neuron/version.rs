//! The runtime's version, and what is decided by it.
#![forbid(unsafe_code)]

use std::fmt;

/// Version of the runtime library (not of the SDK): 2.34.10 and so on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// First number.
    pub major: u64,
    /// Second number.
    pub minor: u64,
    /// Third number.
    pub patch: u64,
    /// Fourth number, 0 in releases.
    pub maintenance: u64,
}

/// From here on a tensor may have 4 GiB and more; earlier the size overflowed silently (release notes of SDK 2.28).
const WIDE_TENSORS: Version = Version::new(2, 30, 50);
/// From here on `_x4` tensors are reported with their full size (release notes of SDK 2.31).
const TRUE_X4_SIZES: Version = Version::new(2, 33, 0);
/// Bytes of a tensor that no longer fit 32 bits.
const WIDE: u64 = 1 << 32;

impl Version {
    /// A release.
    pub const fn new(major: u64, minor: u64, patch: u64) -> Version {
        Version { major, minor, patch, maintenance: 0 }
    }

    /// The oldest version without a known silent fault: older ones are served, with a warning.
    pub const RECOMMENDED: Version = WIDE_TENSORS;

    /// The largest tensor in bytes, if the version has a limit of its own.
    pub fn max_tensor_bytes(self) -> Option<u64> {
        (self < WIDE_TENSORS).then_some(WIDE - 1)
    }

    /// Whether the size reported for a packed `_x4` tensor may be a quarter of the true one.
    pub fn reports_quarter_x4_sizes(self) -> bool {
        self < TRUE_X4_SIZES
    }

    /// What a user of this version should know, if anything.
    pub fn warning(self) -> Option<String> {
        (self < Version::RECOMMENDED).then(|| {
            format!(
                "runtime {self} is older than {}: tensors of 4 GiB and more are refused, sizes of packed x4 tensors are \
                 reported wrong and are corrected; upgrade aws-neuronx-runtime-lib",
                Version::RECOMMENDED
            )
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)?;
        if self.maintenance == 0 { Ok(()) } else { write!(f, ".{}", self.maintenance) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_change_at_their_release() {
        let (old, wide) = (Version::new(2, 30, 49), Version::new(2, 30, 50));
        assert_eq!((old.max_tensor_bytes(), wide.max_tensor_bytes()), (Some(u64::from(u32::MAX)), None));
        assert!(old.warning().is_some() && wide.warning().is_none());
        assert!(
            Version::new(2, 32, 31).reports_quarter_x4_sizes() && !Version::new(2, 33, 0).reports_quarter_x4_sizes()
        );
        assert_eq!(Version { maintenance: 3, ..old }.to_string(), "2.30.49.3");
    }
}
