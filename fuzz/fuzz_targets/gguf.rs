//! A GGUF file of any bytes: opening answers, and what opens can be read to its end.
#![no_main]
#![forbid(unsafe_code)]

#[path = "../../tests/support/files.rs"]
mod files;

use trn_kernels::checkpoint::Gguf;

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    if let Ok(file) = Gguf::from_bytes("fuzz", file.to_vec()) {
        files::exercise_gguf(&file);
    }
});
