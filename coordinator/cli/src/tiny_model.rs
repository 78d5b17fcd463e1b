//! A tiny but valid model for stock llama-server: what `drover dev` and the tests serve when no GGUF is given.
//!
//! Llama architecture, two layers of width 64, a vocabulary of bytes, random weights: about 480 KB, loaded in
//! under 0.1 s, thousands of tokens a second. What it says is noise, but noise made to be useful:
//! - lower-case letters and spaces only, so that every token is a character and every chunk of a stream is valid text;
//! - it never ends by itself: a generation runs to `max_tokens`, or to the end of the context;
//! - it reads its whole context, so that at temperature 0 the text depends on the prompt and soon repeats nothing.
//!
//! Owns the model's shape and weights; the file format is in [`gguf`]. Never reads a clock or the system's
//! randomness: the same seed gives the same bytes on every machine.

mod gguf;

use std::io::Write as _;
use std::path::Path;
use std::{fs, io, process};

/// The longest text in tokens, prompt included: about one character each. A KV cache of this size takes 8 MiB.
pub const CONTEXT_LENGTH: u32 = 32_768;
/// The width of an embedding: the number of values `/v1/embeddings` answers for an input.
pub const WIDTH: usize = 64;
/// The number of tokens: three special ones, 256 bytes, and the space.
pub const VOCABULARY: usize = FIRST_BYTE + 256 + 1;

const LAYERS: usize = 2;
const HEADS: usize = 4;
const KEY_VALUE_HEADS: usize = 2;
const HEAD_WIDTH: usize = WIDTH / HEADS;
const FEED_FORWARD: usize = 160;

const UNKNOWN: u32 = 0;
const BEGIN: u32 = 1;
const END: u32 = 2;
/// The token of byte 0; byte `b` is `FIRST_BYTE + b`.
const FIRST_BYTE: usize = 3;
const SPACE: usize = FIRST_BYTE + 256;

/// The channel of the hidden state that holds the same positive value at every token. No layer reads or writes it,
/// so the output layer can use it to favour or forbid a token whatever the rest says.
const CONSTANT: usize = 0;
/// Added to the logit of a token that must never come; the allowed ones lie within about ±15.
const FORBIDDEN: f32 = -200.0;

/// Roles as headings, one message after the other.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<' + message['role'] + '>\\n' + message['content'] + '\\n' }}\
                             {% endfor %}{% if add_generation_prompt %}{{ '<assistant>\\n' }}{% endif %}";

/// Writes the model made from `seed` to `path`, as a whole or not at all: a reader never sees half a file.
///
/// # Errors
/// Those of creating, writing and renaming a file in the folder of `path`, which must exist.
pub fn write(path: &Path, seed: u64) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{} names no file to write a model to", path.display()))
    })?;
    // Unique among processes by the pid and among threads by the thread's number.
    let mut temporary_name = std::ffi::OsString::from(".");
    temporary_name.push(name);
    temporary_name.push(format!(".{}-{:?}.tmp", process::id(), std::thread::current().id()));
    let temporary = path.with_file_name(temporary_name);
    let written = (|| {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(&bytes(seed))?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        // The first error is the one to tell; a leftover temporary file is the lesser evil.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// The bytes of the file that [`write`] writes.
#[must_use]
pub fn bytes(seed: u64) -> Vec<u8> {
    let mut file = gguf::Builder::default();
    describe(&mut file, seed);
    tokenizer(&mut file);
    weights(&mut file, &mut Random(seed));
    file.finish()
}

fn describe(file: &mut gguf::Builder, seed: u64) {
    file.string("general.architecture", "llama");
    file.string("general.type", "model");
    file.string("general.name", &format!("drover tiny {seed}"));
    file.string("general.description", "Random weights for tests and demonstrations: what it says is noise");
    file.u32("general.file_type", 0);
    file.u32("llama.vocab_size", VOCABULARY as u32);
    file.u32("llama.context_length", CONTEXT_LENGTH);
    file.u32("llama.embedding_length", WIDTH as u32);
    file.u32("llama.block_count", LAYERS as u32);
    file.u32("llama.feed_forward_length", FEED_FORWARD as u32);
    file.u32("llama.rope.dimension_count", HEAD_WIDTH as u32);
    file.f32("llama.rope.freq_base", 10_000.0);
    file.u32("llama.attention.head_count", HEADS as u32);
    file.u32("llama.attention.head_count_kv", KEY_VALUE_HEADS as u32);
    file.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
}

/// A SentencePiece vocabulary in which every text falls back to its bytes. Its space is U+2581, as SentencePiece writes it.
fn tokenizer(file: &mut gguf::Builder) {
    const NORMAL: i32 = 1;
    const UNKNOWN_TYPE: i32 = 2;
    const CONTROL: i32 = 3;
    const BYTE: i32 = 6;

    let special = ["<unk>", "<s>", "</s>"].map(str::to_owned);
    let tokens: Vec<String> = special
        .into_iter()
        .chain((0..=255u8).map(|byte| format!("<0x{byte:02X}>")))
        .chain(["\u{2581}".to_owned()])
        .collect();
    let types: Vec<i32> = [UNKNOWN_TYPE, CONTROL, CONTROL].into_iter().chain([BYTE; 256]).chain([NORMAL]).collect();
    file.string("tokenizer.ggml.model", "llama");
    file.string("tokenizer.ggml.pre", "default");
    file.strings("tokenizer.ggml.tokens", &tokens);
    file.f32s("tokenizer.ggml.scores", &[0.0; VOCABULARY]);
    file.i32s("tokenizer.ggml.token_type", &types);
    file.u32("tokenizer.ggml.unknown_token_id", UNKNOWN);
    file.u32("tokenizer.ggml.bos_token_id", BEGIN);
    file.u32("tokenizer.ggml.eos_token_id", END);
    file.bool("tokenizer.ggml.add_bos_token", true);
    file.bool("tokenizer.ggml.add_eos_token", false);
    file.bool("tokenizer.ggml.add_space_prefix", false);
    file.string("tokenizer.chat_template", CHAT_TEMPLATE);
}

fn weights(file: &mut gguf::Builder, random: &mut Random) {
    let width = WIDTH as u64;
    let key_value_width = KEY_VALUE_HEADS * HEAD_WIDTH;

    // Small beside what the layers add: otherwise the next token follows from the last one alone, and a greedy
    // generation soon walks in a circle.
    let mut embedding = random.matrix(VOCABULARY, WIDTH, 0.5);
    for row in embedding.chunks_exact_mut(WIDTH) {
        row[CONSTANT] = 1.0;
    }
    file.tensor("token_embd.weight", &[width, VOCABULARY as u64], &embedding);

    let mut blind_to_constant = [1.0; WIDTH];
    blind_to_constant[CONSTANT] = 0.0;
    for layer in 0..LAYERS {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        // Large keys and queries make attention pick single tokens of the context instead of averaging over it.
        let sharp = 2.0 / (WIDTH as f32).sqrt();
        let plain = 1.0 / (WIDTH as f32).sqrt();
        file.tensor(&name("attn_norm"), &[width], &blind_to_constant);
        file.tensor(&name("attn_q"), &[width, width], &random.matrix(WIDTH, WIDTH, sharp));
        file.tensor(&name("attn_k"), &[width, key_value_width as u64], &random.matrix(key_value_width, WIDTH, sharp));
        file.tensor(&name("attn_v"), &[width, key_value_width as u64], &random.matrix(key_value_width, WIDTH, plain));
        let attention_out = without_constant(random.matrix(WIDTH, WIDTH, 2.0 * plain), WIDTH);
        file.tensor(&name("attn_output"), &[width, width], &attention_out);
        file.tensor(&name("ffn_norm"), &[width], &blind_to_constant);
        let feed = [width, FEED_FORWARD as u64];
        file.tensor(&name("ffn_gate"), &feed, &random.matrix(FEED_FORWARD, WIDTH, 1.5 * plain));
        file.tensor(&name("ffn_up"), &feed, &random.matrix(FEED_FORWARD, WIDTH, 1.5 * plain));
        let feed_out = random.matrix(WIDTH, FEED_FORWARD, 1.0 / (FEED_FORWARD as f32).sqrt());
        file.tensor(&name("ffn_down"), &[FEED_FORWARD as u64, width], &without_constant(feed_out, FEED_FORWARD));
    }

    file.tensor("output_norm.weight", &[width], &[1.0; WIDTH]);
    let mut output = random.matrix(VOCABULARY, WIDTH, 4.0 / (WIDTH as f32).sqrt());
    for (token, row) in output.chunks_exact_mut(WIDTH).enumerate() {
        row[CONSTANT] = if is_spoken(token) { 0.0 } else { FORBIDDEN };
    }
    file.tensor("output.weight", &[width, VOCABULARY as u64], &output);
}

/// Whether the model ever says this token: a lower-case letter or a space.
fn is_spoken(token: usize) -> bool {
    token == SPACE || (FIRST_BYTE + usize::from(b'a')..=FIRST_BYTE + usize::from(b'z')).contains(&token)
}

/// A layer's output matrix (rows of `inputs` values, one a channel) that leaves the constant channel alone.
fn without_constant(mut matrix: Vec<f32>, inputs: usize) -> Vec<f32> {
    matrix[CONSTANT * inputs..(CONSTANT + 1) * inputs].fill(0.0);
    matrix
}

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014): here so that the bytes
/// of a seed do not change with a dependency's version.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// About normal, mean 0 and deviation 1: twelve uniform values less their mean. Sums and products only, so that
    /// every machine computes the same bits.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| (self.next() >> 40) as f32 / (1u32 << 24) as f32).sum::<f32>() - 6.0
    }

    fn matrix(&mut self, rows: usize, columns: usize, deviation: f32) -> Vec<f32> {
        (0..rows * columns).map(|_| self.normal() * deviation).collect()
    }
}

#[cfg(test)]
mod tests;
