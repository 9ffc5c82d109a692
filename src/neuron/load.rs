//! Finding and opening libnrt.
//!
//! # Trust
//! Opening a library runs its initialisers, and calling it runs its code: a path given here, in `TRN_KERNELS_LIBNRT` or through
//! the loader's own search path is trusted as the program itself is, as `LD_LIBRARY_PATH` is. A file that is not a libnrt is
//! refused when it lacks the functions; one that has them and does something else cannot be told apart.
#![allow(unsafe_code)] // dlopen, dlsym, and giving addresses their types

use super::api::{Addresses, Api, symbols};
use super::error::{NeuronError, Result};
use super::sys::functions;
use std::ffi::{CStr, OsStr, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

/// The name under which the loader knows the library.
const SONAME: &str = "libnrt.so.1";
/// Where the package `aws-neuronx-runtime-lib` puts it; usually not on the loader's path.
const PACKAGED: &str = "/opt/aws/neuron/lib/libnrt.so.1";
/// Environment variable with the path of the library to use, and no other.
pub const LIBRARY_VARIABLE: &str = "TRN_KERNELS_LIBNRT";
/// Environment variable that, set to `0`, switches the device off.
pub const SWITCH_VARIABLE: &str = "TRN_KERNELS_NEURON";

/// Which library to open.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LoadOptions {
    /// This file and no other.
    pub path: Option<PathBuf>,
    /// Whether `TRN_KERNELS_LIBNRT` and `TRN_KERNELS_NEURON` are obeyed.
    pub environment: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions { path: None, environment: true }
    }
}

impl LoadOptions {
    /// The file at `path` and no other.
    pub fn path(path: impl Into<PathBuf>) -> Self {
        LoadOptions { path: Some(path.into()), ..LoadOptions::default() }
    }
}

/// How a library was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// [`LoadOptions::path`].
    Explicit,
    /// `TRN_KERNELS_LIBNRT`.
    Environment,
    /// Already in this process: a framework's copy, shared.
    Mapped,
    /// Where the package puts it.
    Package,
    /// The dynamic loader's search path.
    LoaderPath,
}

/// One loaded libnrt. Never unloaded: it starts threads and keeps state of its own, so its code must stay. Copies are the same
/// library; opening one file twice, or under two names, gives one.
#[derive(Clone, Copy)]
pub struct Library(&'static Loaded);

struct Loaded {
    api: Api,
    path: String,
    origin: Origin,
    /// Address of `nrt_init`: what makes it this library and no other.
    anchor: usize,
}

/// Every library opened so far.
static LOADED: Mutex<Vec<&'static Loaded>> = Mutex::new(Vec::new());

impl Library {
    /// Opens libnrt. In this order, where the first that exists decides:
    ///
    /// 1. [`LoadOptions::path`];
    /// 2. the file that `TRN_KERNELS_LIBNRT` names;
    /// 3. a copy that is in the process already, so that a framework and this crate share one;
    /// 4. `/opt/aws/neuron/lib/libnrt.so.1`;
    /// 5. `libnrt.so.1` on the loader's search path.
    ///
    /// A file that exists and does not load is an error, not a reason to look further. Nothing is initialised and no core is
    /// reserved. A path is trusted
    /// as the program itself is, as `LD_LIBRARY_PATH` is: opening a library runs its code.
    ///
    /// # Errors
    /// [`NeuronError::Disabled`], [`NeuronError::NotLinux`], [`NeuronError::LibraryNotFound`],
    /// [`NeuronError::LibraryUnloadable`] with the dynamic linker's words, [`NeuronError::MissingSymbols`] with all names.
    pub fn open(options: &LoadOptions) -> Result<Library> {
        if options.environment && is_switched_off(std::env::var_os(SWITCH_VARIABLE).as_deref()) {
            return Err(NeuronError::Disabled);
        }
        let named = std::env::var_os(LIBRARY_VARIABLE).filter(|v| options.environment && !v.is_empty());
        match (&options.path, named) {
            (Some(path), _) => only(path, Origin::Explicit),
            (None, Some(path)) => only(Path::new(&path), Origin::Environment),
            (None, None) => search(),
        }
    }

    /// The file, or the name it was found by.
    pub fn path(self) -> &'static str {
        &self.0.path
    }

    /// How it was found the first time.
    pub fn origin(self) -> Origin {
        self.0.origin
    }

    pub(super) fn api(self) -> &'static Api {
        &self.0.api
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library").field("path", &self.0.path).field("origin", &self.0.origin).finish()
    }
}

impl PartialEq for Library {
    fn eq(&self, other: &Self) -> bool {
        self.0.anchor == other.0.anchor
    }
}

impl Eq for Library {}

/// Whether the switch variable says off.
pub(super) fn is_switched_off(value: Option<&OsStr>) -> bool {
    value.is_some_and(|v| v == "0")
}

/// A path that somebody named: it, or an error.
fn only(path: &Path, origin: Origin) -> Result<Library> {
    // A name without a slash would send the loader searching; a file is meant.
    let path = if path.is_absolute() { path.to_owned() } else { Path::new(".").join(path) };
    let name = path.display().to_string();
    if !path.exists() {
        return Err(NeuronError::LibraryNotFound { tried: vec![name] });
    }
    match dl::open(path.as_os_str(), false) {
        Ok(opened) => Library::bind(opened, name, origin),
        Err(dlerror) => Err(NeuronError::LibraryUnloadable { path: name, dlerror }),
    }
}

/// Steps 3 to 5 of [`Library::open`].
fn search() -> Result<Library> {
    if !dl::SERVED {
        return Err(NeuronError::NotLinux);
    }
    if let Ok(opened) = dl::open(OsStr::new(SONAME), true) {
        return Library::bind(opened, SONAME.into(), Origin::Mapped);
    }
    if Path::new(PACKAGED).exists() {
        return only(Path::new(PACKAGED), Origin::Package);
    }
    match dl::open(OsStr::new(SONAME), false) {
        Ok(opened) => Library::bind(opened, SONAME.into(), Origin::LoaderPath),
        // The loader's words when the library itself, and not something it needs, is absent.
        Err(dlerror) if dlerror.starts_with(&format!("{SONAME}: cannot open shared object file: No such file")) => {
            let tried = [
                format!("{LIBRARY_VARIABLE} (not set)"),
                format!("{SONAME} in this process"),
                PACKAGED.into(),
                format!("{SONAME} on the loader's path"),
            ];
            Err(NeuronError::LibraryNotFound { tried: tried.into() })
        }
        Err(dlerror) => Err(NeuronError::LibraryUnloadable { path: SONAME.into(), dlerror }),
    }
}

impl Library {
    fn bind(opened: dl::Opened, path: String, origin: Origin) -> Result<Library> {
        let addresses = match Addresses::find(&|name| opened.address(name)) {
            Ok(addresses) => addresses,
            Err(names) => return Err(NeuronError::MissingSymbols { path, names }),
        };
        let anchor = addresses.nrt_init.addr().get();
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = loaded.iter().find(|l| l.anchor == anchor) {
            return Ok(Library(known));
        }
        // SAFETY: the addresses come from one library that stays for the life of the process (`Opened` never closes), looked up
        // by the names of the fields; that the library is a libnrt is what this module's section on trust says.
        let api = unsafe { api(&addresses) };
        let new: &'static Loaded = Box::leak(Box::new(Loaded { api, path, origin, anchor }));
        loaded.push(new);
        Ok(Library(new))
    }
}

/// Writes [`api`]: every address with its type.
macro_rules! typed {
    (required { $($name:ident: $kind:ident,)* } optional { $($extra:ident: $extra_kind:ident,)* }) => {
        /// Gives every address the type of its function.
        ///
        /// # Safety
        /// Each address is that of libnrt's function of the field's name, and stays mapped for the life of the process.
        unsafe fn api(addresses: &Addresses) -> Api {
            Api {
                $($name: {
                    // SAFETY: a function pointer is as wide as a data pointer on every platform with `dlsym` (POSIX), is not
                    // null as `NonNull` is not, and the caller promises what is there: the function whose C prototype, the
                    // same in every public header since 2022, is written as this type.
                    unsafe { std::mem::transmute::<NonNull<c_void>, functions::$kind>(addresses.$name) }
                },)*
                $($extra: addresses.$extra.map(|address| {
                    // SAFETY: as above; the prototype has been the same since the function first appeared.
                    unsafe { std::mem::transmute::<NonNull<c_void>, functions::$extra_kind>(address) }
                }),)*
            }
        }
    };
}
symbols!(typed);

/// dlopen and dlsym, with the whole of the linker's message.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
mod dl {
    use super::{CStr, NonNull, OsStr, c_void};
    use libloading::os::unix;
    use std::mem::ManuallyDrop;

    pub(super) const SERVED: bool = true;

    /// `RTLD_NOLOAD` of Linux: only if it is in the process already.
    const RTLD_NOLOAD: i32 = 4;

    /// Never closed, not even when refused: its initialisers may have started threads that run its code.
    pub(super) struct Opened(ManuallyDrop<unix::Library>);

    /// Opens `name` with every symbol bound now, so that a missing one is an error here and not a crash at the first call.
    pub(super) fn open(name: &OsStr, only_if_mapped: bool) -> Result<Opened, String> {
        let flags = unix::RTLD_NOW | unix::RTLD_LOCAL | if only_if_mapped { RTLD_NOLOAD } else { 0 };
        // SAFETY: what `dlopen` asks is that the initialisers of the library and of what it needs are sound to run: the operator
        // who put it on the path vouches for it (section on trust). libnrt's own are run by every framework that loads it.
        let opened = unsafe { unix::Library::open(Some(name), flags) };
        opened.map(|l| Opened(ManuallyDrop::new(l))).map_err(|e| whole_message(&e))
    }

    impl Opened {
        /// Where a symbol is, if the library has it.
        pub(super) fn address(&self, name: &CStr) -> Option<NonNull<c_void>> {
            // SAFETY: `get` asks that the symbol be of the type it is given: an address is taken as an address, and nothing is
            // read or called through it here.
            let symbol = unsafe { self.0.get::<*mut c_void>(name.to_bytes_with_nul()) };
            symbol.ok().and_then(|s| NonNull::new(s.as_raw_ptr()))
        }
    }

    /// libloading says "dlopen failed" and keeps the linker's words as the source.
    fn whole_message(e: &dyn std::error::Error) -> String {
        let deepest = std::iter::successors(e.source(), |e| e.source()).last();
        deepest.map_or_else(|| e.to_string(), ToString::to_string)
    }
}

/// No libnrt exists for this platform.
#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
mod dl {
    use super::{CStr, NonNull, OsStr, c_void};

    pub(super) const SERVED: bool = false;

    pub(super) enum Opened {}

    pub(super) fn open(_name: &OsStr, _only_if_mapped: bool) -> Result<Opened, String> {
        Err("libnrt exists for 64-bit Linux only".into())
    }

    impl Opened {
        pub(super) fn address(&self, _name: &CStr) -> Option<NonNull<c_void>> {
            match *self {}
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn plain(path: impl Into<PathBuf>) -> LoadOptions {
        LoadOptions { path: Some(path.into()), environment: false }
    }

    #[test]
    fn an_absent_file_is_not_looked_for_elsewhere() {
        let path = tempfile::tempdir().unwrap().path().join("libnrt.so.1");
        let e = Library::open(&plain(&path)).unwrap_err();
        assert_eq!(e, NeuronError::LibraryNotFound { tried: vec![path.display().to_string()] });
    }

    #[test]
    fn a_text_file_is_refused_with_the_linkers_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libnrt.so.1");
        std::fs::write(&path, "not a library\n").unwrap();
        match Library::open(&plain(&path)).unwrap_err() {
            NeuronError::LibraryUnloadable { path: named, dlerror } => {
                assert_eq!(named, path.display().to_string());
                assert!(dlerror.contains("file too short") || dlerror.contains("invalid ELF header"), "{dlerror}");
            }
            other => panic!("{other:?}"),
        }
    }

    /// A true library that is not a libnrt: this process's own C library.
    #[test]
    fn another_library_lacks_every_function() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let libc = maps.split_whitespace().find(|w| w.contains("libc.so") || w.contains("/libc-")).unwrap();
        match Library::open(&plain(libc)).unwrap_err() {
            NeuronError::MissingSymbols { names, .. } => assert_eq!(names, super::super::REQUIRED_SYMBOLS),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_zero_switches_off() {
        let off = |v: &str| is_switched_off(Some(OsStr::new(v)));
        assert!(off("0") && !off("") && !off("1") && !off("00") && !is_switched_off(None));
    }
}
