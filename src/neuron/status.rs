//! What the library answers: numbers with names, and what a caller should do about them.
#![forbid(unsafe_code)]

use std::fmt;

/// An `NRT_STATUS`. Any number: libraries newer than this crate may answer with one that has no name here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Status(pub u32);

/// What a [`Status`] asks of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StatusClass {
    /// The call did what it should.
    Success,
    /// The call was wrong: repeating it changes nothing.
    CallerBug,
    /// There was no room in a queue; the same call may work in a moment ([`retry`](super::retry)).
    Retryable,
    /// The device, the host or the instance has not enough of something.
    Capacity,
    /// The model ran, and not-a-number appeared: outputs are not to be used.
    Numeric,
    /// The execution unit is dead or in an unknown state: this process must stop using it.
    Poison,
    /// Anything else, known or not. As every status but success, it makes outputs unusable.
    Other,
}

/// Constants, the name table and [`Status::ALL`] from one list.
macro_rules! statuses {
    ($($value:literal $name:ident $class:ident $meaning:literal;)*) => {
        impl Status {
            $(#[doc = $meaning] pub const $name: Status = Status($value);)*

            /// Every status of the public headers, ascending.
            pub const ALL: &'static [Status] = &[$(Status($value)),*];

            /// Its name in the header without `NRT_`, if it has one.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }

            /// One line on what it means, if it is known.
            pub const fn meaning(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some($meaning),)*
                    _ => None,
                }
            }

            /// What it asks of the caller. Unknown numbers are [`StatusClass::Other`].
            pub const fn class(self) -> StatusClass {
                match self.0 {
                    $($value => StatusClass::$class,)*
                    _ => StatusClass::Other,
                }
            }
        }
    };
}

// Values and meanings: libnrt headers up to SDK 2.28 and the developer guide. 8 and 12 are not in use.
statuses! {
    0 SUCCESS Success "done";
    1 FAILURE Other "general failure; from nrt_init: no driver, wrong driver, or the cores belong to another process";
    2 INVALID CallerBug "bad NEFF, or wrong tensor name, size or argument";
    3 INVALID_HANDLE CallerBug "bad handle";
    4 RESOURCE Capacity "allocation failed (out of device memory)";
    5 TIMEOUT Poison "the execution hung";
    6 HW_ERROR Poison "hardware failure, or a NEFF made for another architecture";
    7 QUEUE_FULL Retryable "no free slot in the queue";
    9 LOAD_NOT_ENOUGH_NC Capacity "the NEFF needs more cores than there are";
    10 UNSUPPORTED_NEFF_VERSION CallerBug "the runtime does not know this version of NEFF";
    11 FAIL_HOST_MEM_ALLOC Capacity "out of host memory (legacy)";
    13 UNINITIALIZED CallerBug "called before nrt_init";
    14 CLOSED CallerBug "called after nrt_close";
    15 QUEUE_EMPTY Other "no data";
    101 EXEC_UNIT_UNRECOVERABLE Poison "the execution unit is dead; the process must restart";
    1002 EXEC_BAD_INPUT CallerBug "bad input to execute";
    1003 EXEC_COMPLETED_WITH_NUM_ERR Numeric "not-a-number was seen";
    1004 EXEC_COMPLETED_WITH_ERR Other "logical or parity error";
    1005 EXEC_NC_BUSY Capacity "the core is locked by another model or process";
    1006 EXEC_OOB CallerBug "an indirect copy or embedding went out of bounds";
    1100 COLL_PENDING Other "a collective is still pending";
    1200 EXEC_HW_ERR_COLLECTIVES Poison "a collective is stuck, perhaps through another worker";
    1201 EXEC_HW_ERR_HBM_UE Poison "unrepairable error in device memory: results are wrong";
    1202 EXEC_HW_ERR_NC_UE Poison "parity error in on-chip memory: results are wrong";
    1203 EXEC_HW_ERR_DMA_ABORT Poison "a DMA engine is dead";
    1204 EXEC_SW_NQ_OVERFLOW Other "the notification queue overflowed (set NEURON_RT_ENABLE_DGE_NOTIFICATIONS=0)";
    1205 EXEC_HW_ERR_REPAIRABLE_HBM_UE Poison "repairable error in device memory: results are wrong";
    1206 NETWORK_PROXY_FAILURE Other "the network proxy failed";
}

impl Status {
    /// Whether the call did what it should.
    pub const fn is_success(self) -> bool {
        self.0 == Status::SUCCESS.0
    }

    /// The status called `name`, with or without `NRT_`. Knows the names of older headers and of the guide.
    pub fn by_name(name: &str) -> Option<Status> {
        let name = name.strip_prefix("NRT_").unwrap_or(name);
        match name {
            "EXEC_UNIT_DISABLED" => Some(Status::EXEC_UNIT_UNRECOVERABLE), // before SDK 2.28
            "OOB" => Some(Status::EXEC_OOB),                               // the guide's table
            _ => Status::ALL.iter().copied().find(|s| s.name() == Some(name)),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name(), self.meaning()) {
            (Some(name), Some(meaning)) => write!(f, "NRT_{name} ({}): {meaning}", self.0),
            _ => write!(f, "status {} (unknown to this version of the crate)", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_a_name_that_leads_back() {
        assert_eq!(Status::ALL.len(), 28);
        assert!(Status::ALL.is_sorted());
        for &status in Status::ALL {
            let name = status.name().unwrap();
            assert_eq!(Status::by_name(name), Some(status));
            assert_eq!(Status::by_name(&format!("NRT_{name}")), Some(status));
            assert!(status.to_string().contains(&format!("NRT_{name} ({})", status.0)));
        }
        assert_eq!(Status::by_name("NRT_EXEC_UNIT_DISABLED"), Some(Status(101)));
        assert_eq!(Status::by_name("NRT_OOB"), Some(Status(1006)));
    }

    #[test]
    fn unknown_numbers_are_kept() {
        for number in [8, 12, 99_999, u32::MAX] {
            let status = Status(number);
            assert_eq!((status.name(), status.class(), status.is_success()), (None, StatusClass::Other, false));
            assert!(status.to_string().contains(&number.to_string()));
        }
    }

    #[test]
    fn classes_are_those_of_the_guide() {
        let of = |class| Status::ALL.iter().filter(|s| s.class() == class).map(|s| s.0).collect::<Vec<_>>();
        assert_eq!(of(StatusClass::Success), [0]);
        assert_eq!(of(StatusClass::Retryable), [7]);
        assert_eq!(of(StatusClass::CallerBug), [2, 3, 10, 13, 14, 1002, 1006]);
        assert_eq!(of(StatusClass::Capacity), [4, 9, 11, 1005]);
        assert_eq!(of(StatusClass::Numeric), [1003]);
        assert_eq!(of(StatusClass::Poison), [5, 6, 101, 1200, 1201, 1202, 1203, 1205]);
    }
}
