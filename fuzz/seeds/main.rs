//! Writes small valid files to start fuzzing from: `seeds CORPUS_DIR` fills one folder for each target.
#![forbid(unsafe_code)]

#[path = "../../tests/support/files.rs"]
mod files;
#[path = "../../tests/support/random.rs"]
mod random;

use files::{GgufEntry, GgufFile, gguf_array, gguf_string, safetensors};
use random::{RandomMatrix, Rng, SCHEMES};
use std::path::{Path, PathBuf};
use std::{env, fs, io};
use trn_kernels::Cpu;

fn write(dir: &Path, target: &str, name: &str, bytes: impl AsRef<[u8]>) -> io::Result<()> {
    let dir = dir.join(target);
    fs::create_dir_all(&dir)?;
    fs::write(dir.join(name), bytes)
}

/// A ustar archive of one small file.
fn tar(name: &str, contents: &[u8]) -> Vec<u8> {
    let mut tar = vec![0u8; 512];
    let size = format!("{:011o}", contents.len());
    for (at, field) in [(0, name), (100, "0000644"), (124, &size), (148, "        "), (156, "0"), (257, "ustar\u{0}00")]
    {
        tar[at..at + field.len()].copy_from_slice(field.as_bytes());
    }
    let sum: u32 = tar.iter().map(|b| u32::from(*b)).sum();
    tar[148..156].copy_from_slice(format!("{sum:06o}\u{0} ").as_bytes());
    tar.extend_from_slice(contents);
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    tar
}

fn main() -> io::Result<()> {
    let corpus = PathBuf::from(env::args_os().nth(1).ok_or(io::Error::other("usage: seeds CORPUS_DIR"))?);
    let one = 1.0f32.to_le_bytes();
    type Layer<'a> = &'a [(&'a str, &'a str, &'a [usize], &'a [u8])];
    let layers: [(&str, Layer<'_>); 7] = [
        ("dense", &[("p.weight", "BF16", &[1, 2], &[0; 4]), ("p.bias", "F32", &[1], &one)]),
        ("tensor", &[("p.weight", "F8_E4M3", &[1, 2], &[1; 2]), ("p.weight_scale", "F32", &[], &one)]),
        ("block", &[("p.weight", "F8_E5M2", &[1, 2], &[1; 2]), ("p.weight_scale_inv", "F32", &[1, 1], &one)]),
        ("mxfp8", &[("p.weight", "F8_E4M3", &[1, 32], &[1; 32]), ("p.weight_scale", "U8", &[1, 1], &[127])]),
        ("mxfp4", &[("p.weight_packed", "U8", &[1, 16], &[1; 16]), ("p.weight_scale", "U8", &[1, 1], &[127])]),
        (
            "nvfp4",
            &[
                ("p.weight_packed", "U8", &[1, 8], &[1; 8]),
                ("p.weight_scale", "F8_E4M3", &[1, 1], &[0x38]),
                ("p.weight_global_scale", "F32", &[1], &one),
            ],
        ),
        ("kv", &[("a.k_scale", "F32", &[], &one), ("a.v_proj.v_scale", "F32", &[1], &one)]),
    ];
    for (name, tensors) in layers {
        write(&corpus, "safetensors", name, safetensors(tensors))?;
    }
    write(&corpus, "gguf", "all-values", GgufFile::good().bytes())?;
    let bare = GgufFile { keys: vec![], ..GgufFile::good() };
    let words = gguf_array(8, 2, &[gguf_string("a"), gguf_string("b")].concat());
    write(&corpus, "gguf", "tensors", bare.bytes())?;
    write(&corpus, "gguf", "words", GgufFile { version: 2, ..bare }.with_key("words", 9, words).bytes())?;
    let entry = |name: &str, extents: &[u64], ggml_type, offset| GgufEntry {
        name: name.into(),
        extents: extents.into(),
        ggml_type,
        offset,
    };
    let tensors = vec![entry("w.weight", &[64, 1], 40, 0), entry("w.scale", &[1], 0, 64)];
    let data = [&[0x38; 64][..], &one].concat();
    write(&corpus, "gguf", "nvfp4", GgufFile { keys: vec![], tensors, data, ..GgufFile::good() }.bytes())?;
    // Page size of the pool; then indptr, indices and last_page_len, or a block table and lengths; then what is appended.
    write(&corpus, "page_table", "flashinfer", [1, 0, 3, 0, 2, 3, 3, 0, 3, 6, 2, 1, 4, 3, 0, 1, 3])?;
    write(&corpus, "page_table", "vllm", [1, 1, 4, 0, 3, 6, 7, 2, 5, 8, 2, 3, 0, 1, 2])?;
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels");
    // Programs as they are; the first byte says so (others take a program and edit it).
    for entry in fs::read_dir(kernels.join("programs"))? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if path.extension().is_some_and(|e| e == "json") {
            write(&corpus, "program", &name, fs::read(path)?)?;
        }
    }
    for (i, edits) in [&[][..], &[3, 0, 40, 1, 0], &[9, 1, 0, 2, 7, 200, 2, 30, 5]].into_iter().enumerate() {
        write(&corpus, "program", &format!("edits-{i}"), [&[i as u8], edits].concat())?;
    }
    // An entry of the manifest with a call, and a check alone.
    let manifest = fs::read_to_string(kernels.join("manifest.toml"))?;
    for (i, entry) in manifest.split("[[kernel]]").skip(1).enumerate() {
        let call = [0, 1, 8, 128, 2, 64, 8, 1, 1, 64, 0, 0, 4, 16, 2, 64];
        write(&corpus, "manifest", &format!("entry-{i}"), [b"[[kernel]]", entry.as_bytes(), &call].concat())?;
        for (j, check) in entry.split("check = \"").skip(1).filter_map(|c| c.split('"').next()).enumerate() {
            write(&corpus, "manifest", &format!("check-{i}-{j}"), format!("!{check}"))?;
        }
    }
    // Packed weights of every scheme: a panel and a bit, steps that are full and one that is not.
    for (i, scheme) in SCHEMES.into_iter().enumerate() {
        let k = if scheme.block() == 1 { 37 } else { 5 * scheme.block() };
        for n in [3, 17] {
            let w = RandomMatrix::new(&mut Rng(i as u64), scheme, n, k, 4);
            let mut file = vec![];
            Cpu::detect().pack(&w.view()).map_err(io::Error::other)?.write_to(&mut file)?;
            write(&corpus, "packed", &format!("scheme-{i}-{n}"), file)?;
        }
    }
    // One entry each: usage, dtype, ndim, has a shape, wide, size, name.
    let entries = [&[34][..], &[0, 14, 2, 1, 0, 64], b"kv.must_alias_input\0", &[1, 14, 2, 1, 0, 64], b"kv\0"].concat();
    write(&corpus, "tensor_info", "in-place", entries)?;
    write(&corpus, "neff", "tar", tar("sg00/def.json", br#"{"var":{"x":{"type":"input","var_id":0,"size":4}}}"#))?;
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tiny-gpt-oss");
    for (name, path) in [("hugging-face", "config.json"), ("original", "original/config.json")] {
        write(&corpus, "gpt_oss_config", name, fs::read(models.join(path))?)?;
    }
    Ok(())
}
