//! A safetensors file of any bytes: opening answers, and what opens can be read to its end.
#![no_main]
#![forbid(unsafe_code)]

#[path = "../../tests/support/files.rs"]
mod files;

use trn_kernels::checkpoint::Checkpoint;

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    if let Ok(checkpoint) = Checkpoint::from_bytes("fuzz", file.to_vec()) {
        files::exercise_checkpoint(&checkpoint);
    }
});
