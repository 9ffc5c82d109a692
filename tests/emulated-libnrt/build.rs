//! Gives the library the name that the real one has, so that the dynamic linker takes it for the real one.

fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libnrt.so.1");
    println!("cargo:rerun-if-changed=build.rs");
}
