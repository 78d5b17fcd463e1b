//! The file is read back by a reader that shares nothing with the writer.

use super::*;

/// Reads a GGUF file from its first byte; panics where it is not one.
struct Reader<'a>(&'a [u8], usize);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> &'a [u8] {
        let taken = &self.0[self.1..self.1 + length];
        self.1 += length;
        taken
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().unwrap())
    }
    fn text(&mut self) -> &'a str {
        let length = self.u64() as usize;
        std::str::from_utf8(self.take(length)).unwrap()
    }
    /// The length of an array; 1 for a single value.
    fn value(&mut self, value_type: u32) -> u64 {
        match value_type {
            4..=6 => _ = self.take(4),
            7 => _ = self.take(1),
            8 => _ = self.text(),
            9 => {
                let element = self.u32();
                let length = self.u64();
                (0..length).for_each(|_| _ = self.value(element));
                return length;
            }
            other => panic!("value type {other}"),
        }
        1
    }
}

#[test]
fn the_file_reads_back_as_gguf_with_every_tensor_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    write(&path, 7).unwrap();
    let file = fs::read(&path).unwrap();
    assert!((440_000..520_000).contains(&file.len()), "{} bytes", file.len());

    let mut reader = Reader(&file, 0);
    assert_eq!(reader.take(4), b"GGUF");
    assert_eq!(reader.u32(), 3);
    let tensors = reader.u64();
    let pairs = reader.u64();
    assert_eq!(tensors, 3 + 9 * LAYERS as u64);
    let mut keys = Vec::new();
    for _ in 0..pairs {
        let key = reader.text();
        let value_type = reader.u32();
        let length = reader.value(value_type);
        if key.starts_with("tokenizer.ggml.") && length > 1 {
            assert_eq!(length, VOCABULARY as u64, "{key}");
        }
        keys.push(key);
    }
    for wanted in ["general.architecture", "llama.context_length", "tokenizer.chat_template", "tokenizer.ggml.tokens"] {
        assert!(keys.contains(&wanted), "{wanted} is missing");
    }

    let mut end = 0;
    for _ in 0..tensors {
        let name = reader.text();
        let dimensions = reader.u32();
        let values: u64 = (0..dimensions).map(|_| reader.u64()).product();
        assert_eq!(reader.u32(), 0, "{name} is of 32-bit floats");
        let offset = reader.u64();
        assert_eq!(offset, end, "{name} begins where the tensor before it ends");
        end = (offset + values * 4).next_multiple_of(32);
    }
    let data = reader.1.next_multiple_of(32) as u64;
    assert_eq!(data + end, file.len() as u64, "the data ends with the file");
}

#[test]
fn one_seed_gives_one_file_and_another_seed_another() {
    assert_eq!(bytes(1), bytes(1));
    assert_ne!(bytes(1), bytes(2));
    assert_eq!(bytes(1).len(), bytes(2).len());
}

#[test]
fn writing_leaves_nothing_but_the_file_and_replaces_an_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    write(&path, 1).unwrap();
    write(&path, 2).unwrap();
    assert_eq!(fs::read(&path).unwrap(), bytes(2));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_missing_folder_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(write(&folder.path().join("no/tiny.gguf"), 1).unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(write(Path::new("/"), 1).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}
