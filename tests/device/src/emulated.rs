//! A copy of the emulated library in a folder of its own, under the name that clients look for.
#![allow(unsafe_code)]

use crate::raw::Raw;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{CString, c_char};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

/// Bits for [`Emulated::set_flags`].
#[allow(missing_docs)] // described in tests/emulated-libnrt/README.md
pub mod flag {
    pub const REINIT_AFTER_CLOSE_FAILS: u32 = 1;
    pub const LEGACY_DTYPES: u32 = 1 << 1;
    pub const X4_QUARTER_SIZE: u32 = 1 << 2;
    pub const FP8_AS_INT8: u32 = 1 << 3;
    pub const AUTO_VNC: u32 = 1 << 4;
    pub const SLOW_EXEC: u32 = 1 << 5;
    pub const INFO_COUNT_ZERO: u32 = 1 << 6;
    pub const INFO_COUNT_ABSURD: u32 = 1 << 7;
    pub const INFO_NDIM_ABSURD: u32 = 1 << 8;
    pub const INFO_NDIM_ZERO: u32 = 1 << 9;
    pub const INFO_NAME_UNTERMINATED: u32 = 1 << 10;
    pub const INFO_NULL: u32 = 1 << 11;
    pub const INFO_DTYPE_UNKNOWN: u32 = 1 << 12;
    pub const VERSION_UNTERMINATED: u32 = 1 << 13;
    pub const EXEC_PANICS: u32 = 1 << 14;
    pub const OCP_SCALES: u32 = 1 << 15;
}

/// What [`Emulated::live`] counts.
#[allow(missing_docs)] // the names say it
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Everything = 0,
    Models = 1,
    Tensors = 2,
    Sets = 3,
    TensorInfos = 4,
    Executions = 5,
}

/// The library that cargo built for this test run.
pub fn shared_object() -> PathBuf {
    let exe = std::env::current_exe().expect("a test has a path");
    let name = "libemulated_libnrt.so";
    let found = exe.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is not beside {}", exe.display()))
}

/// A private copy of the library.
pub struct Emulated {
    // Never closed: the real library does not bear it.
    library: ManuallyDrop<Library>,
    folder: tempfile::TempDir,
}

impl Default for Emulated {
    fn default() -> Emulated {
        Emulated::new()
    }
}

impl Emulated {
    /// A fresh copy, loaded.
    pub fn new() -> Emulated {
        Emulated::without(&[])
    }

    /// A copy that lacks some symbols, as an older runtime does: their names in its symbol table are changed.
    pub fn without(symbols: &[&str]) -> Emulated {
        let mut bytes = loaded_part(std::fs::read(shared_object()).expect("the emulated library"));
        for symbol in symbols {
            let name = format!("\0{symbol}\0").into_bytes();
            let places: Vec<usize> =
                bytes.windows(name.len()).enumerate().filter(|(_, w)| *w == name).map(|(at, _)| at).collect();
            assert!(!places.is_empty(), "the emulated library has no {symbol}");
            places.into_iter().for_each(|at| bytes[at + 1] = b'-');
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("libnrt.so.1");
        std::fs::write(&path, bytes).expect("a copy of the emulated library");
        // SAFETY: the emulated library's initialisers are those of the Rust standard library, which may run at any time.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL) };
        let library = ManuallyDrop::new(library.unwrap_or_else(|e| panic!("{}: {e:?}", path.display())));
        let emulated = Emulated { library, folder };
        // SAFETY: the README's prototype.
        let abi_version: extern "C" fn() -> u32 = unsafe { emulated.symbol("emunrt_abi_version") };
        assert_eq!(abi_version(), 1, "the emulated library is another generation's");
        emulated
    }

    /// Where it lies: `.../libnrt.so.1`.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("libnrt.so.1")
    }

    /// Its folder, which nothing else uses.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The runtime's functions as they are.
    pub fn raw(&self) -> Raw {
        Raw::resolve(&self.library)
    }

    /// A control call.
    ///
    /// # Safety
    /// `F` is the type of the function of that name.
    unsafe fn symbol<F: Copy>(&self, name: &str) -> F {
        // SAFETY: this function's contract.
        let symbol = unsafe { self.library.get::<F>(name) };
        *symbol.unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Everything as after loading; handles of before stay stale.
    pub fn reset(&self) {
        // SAFETY: the README's prototype.
        let call: extern "C" fn() = unsafe { self.symbol("emunrt_reset") };
        call();
    }

    /// Plays this runtime version, with its bugs.
    pub fn set_version(&self, version: [u64; 4]) {
        // SAFETY: the README's prototype.
        let call: extern "C" fn(u64, u64, u64, u64) = unsafe { self.symbol("emunrt_set_version") };
        call(version[0], version[1], version[2], version[3]);
    }

    /// Cores of the instance, and of this process.
    pub fn set_cores(&self, total: u32, visible: u32) {
        // SAFETY: the README's prototype.
        let call: extern "C" fn(u32, u32) = unsafe { self.symbol("emunrt_set_cores") };
        call(total, visible);
    }

    /// Behaviours, all at once; see [`flag`].
    pub fn set_flags(&self, flags: u32) {
        // SAFETY: the README's prototype.
        let call: extern "C" fn(u32) = unsafe { self.symbol("emunrt_set_flags") };
        call(flags);
    }

    /// 2 or 3: refuses programs for other chips; 0: takes all.
    pub fn set_chip(&self, generation: u32) {
        // SAFETY: the README's prototype.
        let call: extern "C" fn(u32) = unsafe { self.symbol("emunrt_set_chip") };
        call(generation);
    }

    /// Device memory of each core, in bytes.
    pub fn set_memory(&self, bytes: u64) {
        // SAFETY: the README's prototype.
        let call: extern "C" fn(u64) = unsafe { self.symbol("emunrt_set_memory") };
        call(bytes);
    }

    /// Milliseconds of each execution under [`flag::SLOW_EXEC`].
    pub fn set_delay_ms(&self, milliseconds: u64) {
        // SAFETY: the README's prototype.
        let call: extern "C" fn(u64) = unsafe { self.symbol("emunrt_set_delay_ms") };
        call(milliseconds);
    }

    /// After `skip` more calls of `function`, its next `times` (`u32::MAX`: all) give `status`; 0 times takes orders back.
    pub fn inject(&self, function: &str, status: u32, skip: u32, times: u32) {
        let name = CString::new(function).expect("a function's name");
        // SAFETY: the README's prototype.
        let call: unsafe extern "C" fn(*const c_char, u32, u32, u32) -> u32 = unsafe { self.symbol("emunrt_inject") };
        // SAFETY: the name is NUL-terminated.
        let known = unsafe { call(name.as_ptr(), status, skip, times) };
        assert_eq!(known, 0, "{function} is not a function of the emulated library");
    }

    /// Objects alive.
    pub fn live(&self, kind: Kind) -> u64 {
        // SAFETY: the README's prototype.
        let call: extern "C" fn(u32) -> u64 = unsafe { self.symbol("emunrt_live") };
        call(kind as u32)
    }

    /// Calls of a function since the last reset.
    pub fn calls(&self, function: &str) -> u64 {
        let name = CString::new(function).expect("a function's name");
        // SAFETY: the README's prototype.
        let call: unsafe extern "C" fn(*const c_char) -> u64 = unsafe { self.symbol("emunrt_calls") };
        // SAFETY: the name is NUL-terminated.
        unsafe { call(name.as_ptr()) }
    }

    /// Every call with its status, in order.
    pub fn log(&self) -> Vec<(String, u32)> {
        let line = |line: &str| {
            let (function, status) = line.split_once(' ').expect("a line of the log");
            (function.into(), status.parse().expect("a status"))
        };
        self.text("emunrt_call_log").lines().map(line).collect()
    }

    /// Why the last refused call was refused.
    pub fn last_reason(&self) -> String {
        self.text("emunrt_last_reason")
    }

    /// Functions of the runtime that it exports: the required ones, and the optional ones.
    pub fn symbols(&self) -> (Vec<String>, Vec<String>) {
        let text = self.text("emunrt_symbols");
        let of = |word: &str| text.lines().filter_map(|l| l.strip_prefix(word)).map(String::from).collect();
        (of("required "), of("optional "))
    }

    /// What the client did that the documents forbid. In a forked child: how many calls it made, without texts.
    pub fn violation_count(&self) -> u64 {
        // SAFETY: the README's prototype.
        let call: extern "C" fn() -> u64 = unsafe { self.symbol("emunrt_violation_count") };
        call()
    }

    /// The violations in words.
    pub fn violations(&self) -> Vec<String> {
        type Text = unsafe extern "C" fn(u64, *mut c_char, usize) -> usize;
        // SAFETY: the README's prototype.
        let call: Text = unsafe { self.symbol("emunrt_violation_text") };
        // SAFETY: `text` passes a buffer with its length.
        let one = |i| text(&|buffer, len| unsafe { call(i, buffer, len) });
        (0..self.violation_count()).map(one).collect()
    }

    /// Panics if anything is alive or any violation was recorded.
    pub fn assert_clean(&self) {
        self.assert_no_violation();
        assert_eq!(self.live(Kind::Everything), 0, "objects were left");
    }

    /// Panics if any violation was recorded; objects may be alive.
    pub fn assert_no_violation(&self) {
        assert_eq!(self.violations(), [""; 0]);
    }

    fn text(&self, function: &str) -> String {
        // SAFETY: the README's prototype, which all text calls share.
        let call: unsafe extern "C" fn(*mut c_char, usize) -> usize = unsafe { self.symbol(function) };
        // SAFETY: `text` passes a buffer with its length.
        text(&|buffer, len| unsafe { call(buffer, len) })
    }
}

/// The part of a library that is loaded. What is behind it (debug information, section headers) makes nine tenths of a copy.
fn loaded_part(mut file: Vec<u8>) -> Vec<u8> {
    // ELF64, little endian: e_phoff at 32, e_phentsize at 54, e_phnum at 56; p_offset at 8 and p_filesz at 32 of each entry.
    let number = |at: usize, bytes: usize| {
        let word = file.get(at..at + bytes).expect("a whole ELF file");
        word.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
    };
    assert_eq!(number(0, 6), 0x0102_464C_457F, "not a little-endian ELF64 file");
    let segment = |i| {
        let header = number(32, 8) + i * number(54, 2);
        number(header + 8, 8) + number(header + 32, 8)
    };
    let end = (0..number(56, 2)).map(segment).max().expect("segments");
    file.truncate(end);
    file
}

/// The text that a call gives, as `snprintf` would.
fn text(call: &dyn Fn(*mut c_char, usize) -> usize) -> String {
    let mut buffer = vec![0u8; call(std::ptr::null_mut(), 0) + 1];
    // The text may have grown since, and is cut then.
    let length = call(buffer.as_mut_ptr().cast(), buffer.len()).min(buffer.len() - 1);
    buffer.truncate(length);
    String::from_utf8(buffer).expect("texts are UTF-8")
}
