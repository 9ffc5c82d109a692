//! Every tier of this host, and AMX on an emulator of its instructions where the machine has AVX-512 but no AMX.
#![allow(dead_code)] // not every test needs all of it

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[path = "amx/mod.rs"]
pub(crate) mod amx;

use trn_kernels::{Cpu, Isa};

/// Emulates AMX if need be.
pub(crate) fn with_amx() {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    amx::available();
}

/// Every tier of this host; one that it lacks is reported as skipped.
pub(crate) fn tiers() -> impl Iterator<Item = Cpu<'static>> {
    with_amx();
    Isa::ALL.into_iter().filter_map(|isa| Cpu::with_isa(isa).map_err(|e| eprintln!("skipped: {e}")).ok())
}

/// With the baseline build of the portable one.
pub(crate) fn all_builds() -> impl Iterator<Item = (String, Cpu<'static>)> {
    std::iter::once(("baseline".into(), Cpu::baseline())).chain(tiers().map(|cpu| (cpu.isa().to_string(), cpu)))
}
