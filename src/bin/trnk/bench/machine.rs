//! Where and when: the date, a file name for the CPU, memory that is free, the peak that a tier can reach.
#![forbid(unsafe_code)]

use super::case::Acts;
use std::time::{SystemTime, UNIX_EPOCH};
use trn_kernels::Isa;
use trn_kernels::cpu::limits::Peak;

/// Today in UTC, `YYYY-MM-DD`.
pub(crate) fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    date(seconds / 86_400)
}

/// The date of a day counted from 1970-01-01, in the Gregorian calendar.
fn date(mut days: u64) -> String {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        (days, month) = (days - length, month + 1);
    }
    format!("{year:04}-{month:02}-{:02}", days + 1)
}

/// A text as a file name: lower-case letters and digits, anything else one hyphen.
pub(crate) fn slug(text: &str) -> String {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-").to_ascii_lowercase()
}

/// Bytes that can be had without swapping, where the system tells (Linux).
pub(crate) fn available_memory() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024.0 * kibibytes)
}

/// The fastest arithmetic that a tier can use on these activations: its share is what a kernel of that tier is asked for. Portable
/// code is held against the best that f32 has on this machine.
pub(crate) fn peak(tier: Isa, acts: Acts) -> Option<Peak> {
    let within = |peak: &Peak| match peak {
        Peak::Avx2F32 => true,
        Peak::Avx512F32 => tier != Isa::Avx2,
        Peak::Avx512Bf16 => tier == Isa::Avx512Bf16 && acts == Acts::Bf16,
        _ => tier == Isa::Amx && acts == Acts::Bf16,
    };
    Peak::ALL.into_iter().rev().filter(|peak| peak.missing().is_none()).find(within)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // As `date -u -d @SECONDS` has them.
        for (days, text) in [
            (0, "1970-01-01"),
            (58, "1970-02-28"),
            (59, "1970-03-01"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (20_453, "2025-12-31"),
            (20_454, "2026-01-01"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(date(days), text);
        }
    }

    /// Bf16 products are for bf16 activations on the tier that has them, and nothing is held against what its tier cannot use.
    #[test]
    fn a_tier_has_its_peak() {
        if Peak::Avx512F32.missing().is_none() {
            assert_eq!(peak(Isa::Avx512, Acts::Bf16), Some(Peak::Avx512F32));
            assert_eq!(peak(Isa::Avx512Bf16, Acts::F32), Some(Peak::Avx512F32));
            assert_eq!(peak(Isa::Avx2, Acts::Bf16), Some(Peak::Avx2F32));
        }
        if Peak::Avx512Bf16.missing().is_none() {
            assert_eq!(peak(Isa::Avx512Bf16, Acts::Bf16), Some(Peak::Avx512Bf16));
        }
    }

    #[test]
    fn names_become_file_names() {
        assert_eq!(slug("AMD EPYC (family 26, model 2)"), "amd-epyc-family-26-model-2");
    }
}
