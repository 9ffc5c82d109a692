//! Mapped files read as files in memory do. A test of its own: mapping is the one unsafe way in.

mod support;

use std::fs;
use support::golden_dir;
use trn_kernels::checkpoint::{Checkpoint, Gguf, GptOss};

#[test]
fn a_mapped_checkpoint_equals_one_in_memory() {
    let dir = golden_dir().join("tiny-gpt-oss");
    // SAFETY: golden files are read only, by every test.
    let mapped = unsafe { Checkpoint::map(&dir) }.unwrap();
    let read = Checkpoint::read(&dir).unwrap();
    assert!(mapped.names().eq(read.names()) && mapped.names().count() > 0);
    for name in mapped.names() {
        let (a, b) = (mapped.tensor(name).unwrap(), read.tensor(name).unwrap());
        assert_eq!((a.dtype, a.shape, a.bytes), (b.dtype, b.shape, b.bytes), "{name}");
    }
    assert_eq!(GptOss::new(&mapped).unwrap().config(), GptOss::new(&read).unwrap().config());
}

#[test]
fn a_mapped_gguf_equals_one_in_memory() {
    let layouts = golden_dir().join("layouts");
    let is_gguf = |path: &std::path::PathBuf| path.extension().is_some_and(|e| e == "gguf");
    let files: Vec<_> = fs::read_dir(layouts).unwrap().map(|e| e.unwrap().path()).filter(is_gguf).collect();
    assert!(!files.is_empty());
    for path in files {
        // SAFETY: golden files are read only, by every test.
        let mapped = unsafe { Gguf::map(&path) }.unwrap();
        let read = Gguf::read(&path).unwrap();
        assert!(mapped.keys().eq(read.keys()) && mapped.names().eq(read.names()));
        for name in mapped.names() {
            assert_eq!(mapped.tensor(name).unwrap().bytes, read.tensor(name).unwrap().bytes, "{name}");
        }
    }
}

#[test]
fn what_cannot_be_mapped_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty.safetensors");
    fs::write(&empty, []).unwrap();
    // SAFETY: nobody else knows the folder.
    let message = unsafe { Checkpoint::map(&empty) }.unwrap_err().to_string();
    assert!(message.contains("empty.safetensors") && message.contains("0 bytes"), "{message}");
    // SAFETY: as above.
    let message = unsafe { Gguf::map(dir.path()) }.unwrap_err().to_string();
    assert!(message.contains("not a regular file"), "{message}");
    // SAFETY: as above.
    let message = unsafe { Gguf::map(dir.path().join("absent.gguf")) }.unwrap_err().to_string();
    assert!(message.contains("absent.gguf"), "{message}");
}
