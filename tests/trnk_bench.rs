//! `trnk probe` as a user runs it, on a machine without a device.
#![forbid(unsafe_code)]
