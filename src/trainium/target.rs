//! The devices by the names that kernels and programs know them by.
#![forbid(unsafe_code)]

use super::Chip;

/// The device that a program or kernel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// Trainium1, NeuronCore-v2.
    Trn1,
    /// Trainium2, NeuronCore-v3.
    Trn2,
    /// Trainium3, NeuronCore-v4.
    Trn3,
}

impl Target {
    /// The target called `name`.
    pub fn by_name(name: &str) -> Option<Target> {
        match name {
            "trn1" => Some(Target::Trn1),
            "trn2" => Some(Target::Trn2),
            "trn3" => Some(Target::Trn3),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Target::Trn1 => "trn1",
            Target::Trn2 => "trn2",
            Target::Trn3 => "trn3",
        }
    }

    /// The documented constants of its chip.
    pub const fn chip(self) -> Chip {
        match self {
            Target::Trn1 => Chip::trn1(),
            Target::Trn2 => Chip::trn2(),
            Target::Trn3 => Chip::trn3(),
        }
    }
}
