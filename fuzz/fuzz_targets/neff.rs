//! A NEFF of any bytes: the header and the archive behind it give an answer. The bytes are also tried as a payload with a good
//! header before them, since few inputs would get past one.
#![no_main]
#![forbid(unsafe_code)]

use trn_kernels::neuron::neff::{Archive, HEADER_BYTES, Header, read_file};

fn exercise(neff: &[u8]) {
    let Ok(archive) = Archive::read(neff) else { return };
    assert_eq!(archive.header, Header::parse(neff).expect("the archive's header"));
    for file in archive.files.iter().filter(|f| f.bytes <= 4096) {
        let contents = read_file(neff, &file.name, 4096).map(|c| c.map(|c| c.len()));
        // A name may be there twice, with two sizes; the first is read.
        assert!(matches!(contents, Ok(Some(len)) if len <= 4096) || contents.is_err(), "{file:?}: {contents:?}");
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    exercise(bytes);
    let mut neff = vec![0; HEADER_BYTES];
    neff[0] = 1;
    neff[8..16].copy_from_slice(&(HEADER_BYTES as u64).to_le_bytes());
    neff[16..24].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    neff.extend_from_slice(bytes);
    exercise(&neff);
});
