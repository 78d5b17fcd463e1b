//! The GGUF container, writing side only: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//!
//! Owns the byte layout and nothing else: what the keys and tensors mean is the caller's business.

/// Version 3 of the format, little-endian.
const VERSION: u32 = 3;
/// Tensor data begins at a multiple of this many bytes, and so does each tensor within it: the format's default.
const ALIGNMENT: usize = 32;
/// The format's number for a tensor of 32-bit floats.
const TENSOR_F32: u32 = 0;

/// The format's numbers for the types of metadata values.
const TYPE_U32: u32 = 4;
const TYPE_I32: u32 = 5;
const TYPE_F32: u32 = 6;
const TYPE_BOOL: u32 = 7;
const TYPE_STRING: u32 = 8;
const TYPE_ARRAY: u32 = 9;

/// A GGUF file in the making.
#[derive(Debug, Default)]
pub struct Builder {
    metadata: Vec<u8>,
    metadata_count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

impl Builder {
    /// Adds a number.
    pub fn u32(&mut self, key: &str, value: u32) {
        self.key(key, TYPE_U32);
        self.metadata.extend(value.to_le_bytes());
    }

    /// Adds a number with a fraction.
    pub fn f32(&mut self, key: &str, value: f32) {
        self.key(key, TYPE_F32);
        self.metadata.extend(value.to_le_bytes());
    }

    /// Adds a truth value.
    pub fn bool(&mut self, key: &str, value: bool) {
        self.key(key, TYPE_BOOL);
        self.metadata.push(u8::from(value));
    }

    /// Adds a text.
    pub fn string(&mut self, key: &str, value: &str) {
        self.key(key, TYPE_STRING);
        text(&mut self.metadata, value);
    }

    /// Adds a list of texts.
    pub fn strings(&mut self, key: &str, values: &[String]) {
        self.array(key, TYPE_STRING, values.len());
        for value in values {
            text(&mut self.metadata, value);
        }
    }

    /// Adds a list of numbers with a fraction.
    pub fn f32s(&mut self, key: &str, values: &[f32]) {
        self.array(key, TYPE_F32, values.len());
        self.metadata.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }

    /// Adds a list of signed numbers.
    pub fn i32s(&mut self, key: &str, values: &[i32]) {
        self.array(key, TYPE_I32, values.len());
        self.metadata.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }

    /// Adds a tensor of 32-bit floats. `dimensions` begins with the fastest moving one, as the format wants it;
    /// their product is the number of `values`.
    pub fn tensor(&mut self, name: &str, dimensions: &[u64], values: &[f32]) {
        debug_assert_eq!(dimensions.iter().product::<u64>(), values.len() as u64, "{name}");
        text(&mut self.tensors, name);
        self.tensors.extend((dimensions.len() as u32).to_le_bytes());
        self.tensors.extend(dimensions.iter().flat_map(|dimension| dimension.to_le_bytes()));
        self.tensors.extend(TENSOR_F32.to_le_bytes());
        self.tensors.extend((self.data.len() as u64).to_le_bytes());
        self.tensor_count += 1;
        self.data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        pad(&mut self.data);
    }

    /// The whole file.
    pub fn finish(self) -> Vec<u8> {
        let mut file = Vec::with_capacity(self.metadata.len() + self.tensors.len() + self.data.len() + 64);
        file.extend(b"GGUF");
        file.extend(VERSION.to_le_bytes());
        file.extend(self.tensor_count.to_le_bytes());
        file.extend(self.metadata_count.to_le_bytes());
        file.extend(self.metadata);
        file.extend(self.tensors);
        pad(&mut file);
        file.extend(self.data);
        file
    }

    fn key(&mut self, key: &str, value_type: u32) {
        text(&mut self.metadata, key);
        self.metadata.extend(value_type.to_le_bytes());
        self.metadata_count += 1;
    }

    fn array(&mut self, key: &str, element_type: u32, length: usize) {
        self.key(key, TYPE_ARRAY);
        self.metadata.extend(element_type.to_le_bytes());
        self.metadata.extend((length as u64).to_le_bytes());
    }
}

fn text(out: &mut Vec<u8>, value: &str) {
    out.extend((value.len() as u64).to_le_bytes());
    out.extend(value.as_bytes());
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
}
