//! The header of a GGUF file, looked at before llama-server is: magic, version, plausible counts.
//!
//! Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. Counts out of bounds are how several integer overflows in
//! readers of the format were reached, so they are refused here.

use std::{fs::File, io::Read as _, path::Path};

/// Bytes of the part that is read: magic, version, number of tensors, number of keys.
const HEADER_BYTES: usize = 24;
/// Fewest bytes that a tensor's entry can have: length and one byte of name, dimensions, one size, type, offset.
const TENSOR_BYTES_MIN: u64 = 8 + 1 + 4 + 8 + 4 + 8;
/// Fewest bytes of a key's entry: length and one byte of name, type, one byte of value.
const KEY_BYTES_MIN: u64 = 8 + 1 + 4 + 1;
const TENSORS_MAX: u64 = 1 << 20;
const KEYS_MAX: u64 = 1 << 16;

/// Checks the header of a file of this size. The error says what does not fit.
pub fn check(path: &Path, bytes: u64) -> Result<(), String> {
    let mut header = [0; HEADER_BYTES];
    let mut file = File::open(path).map_err(|e| e.to_string())?;
    file.read_exact(&mut header).map_err(|_| format!("its {bytes} bytes are less than a header"))?;
    parse(&header, bytes)
}

fn parse(header: &[u8; HEADER_BYTES], bytes: u64) -> Result<(), String> {
    let [m0, m1, m2, m3, v0, v1, v2, v3, rest @ ..] = *header;
    if [m0, m1, m2, m3] != *b"GGUF" {
        return Err("it does not begin with \"GGUF\"".to_owned());
    }
    let version = u32::from_le_bytes([v0, v1, v2, v3]);
    if !(2..=3).contains(&version) {
        return Err(format!("its version is {version}; versions 2 and 3 are read"));
    }
    let number = |at: usize| rest[at..at + 8].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    let (tensors, keys) = (number(0), number(8));
    if tensors > TENSORS_MAX || keys > KEYS_MAX {
        return Err(format!("it claims {tensors} tensors and {keys} keys, more than any model has"));
    }
    let least = tensors * TENSOR_BYTES_MIN + keys * KEY_BYTES_MIN + HEADER_BYTES as u64;
    if bytes < least {
        return Err(format!("it claims {tensors} tensors and {keys} keys, but has only {bytes} bytes: it is cut off"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(magic: &[u8; 4], version: u32, tensors: u64, keys: u64) -> [u8; HEADER_BYTES] {
        let mut bytes = magic.to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(keys.to_le_bytes());
        bytes.try_into().unwrap()
    }

    #[test]
    fn implausible_headers_are_refused() {
        parse(&header(b"GGUF", 3, 291, 24), 1 << 30).unwrap();
        for (bad, bytes, part) in [
            (header(b"GGML", 3, 1, 1), 1 << 30, "GGUF"),
            (header(b"GGUF", 1, 1, 1), 1 << 30, "version is 1"),
            (header(b"GGUF", 3, u64::MAX, 1), 1 << 30, "more than any model"),
            (header(b"GGUF", 3, 1, u64::MAX / 2), 1 << 30, "more than any model"),
            (header(b"GGUF", 3, 1000, 20), 2000, "cut off"),
        ] {
            let error = parse(&bad, bytes).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn the_tiny_model_passes_and_a_stub_does_not() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("tiny.gguf");
        drover::tiny_model::write(&path, 1).unwrap();
        check(&path, path.metadata().unwrap().len()).unwrap();
        let stub = place.path().join("stub.gguf");
        std::io::Write::write_all(&mut File::create(&stub).unwrap(), b"GGUF").unwrap();
        assert!(check(&stub, 4).unwrap_err().contains("less than a header"));
    }
}
