//! Which further arguments of llama-server a deployment may give: a static allow-list.
//!
//! Both sides check by it: the coordinator when a deployment is applied, the agent again before a start. Whatever executes,
//! fetches, reads or writes files, opens ports or shows secrets is left out on purpose; whatever a typed field sets is
//! refused with that field's name. No argument is allowed that Drover itself passes.

use std::fmt::Write as _;

/// Longest single argument, in bytes.
pub const BYTES_MAX: usize = 16 << 10;

/// What follows a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    /// Nothing.
    None,
    /// A number.
    Number,
    /// Numbers with commas between them.
    Numbers,
    /// One of these words.
    Word(&'static [&'static str]),
    /// Any text.
    Text,
}

use Value::{None as Bare, Number, Numbers, Text, Word};

const CACHE_TYPES: &[&str] = &["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"];
const SWITCH: &[&str] = &["on", "off", "auto"];

/// Names of a flag, and what follows it. Sorted by topic; the names of one flag stand together.
const ALLOWED: &[(&[&str], Value)] = &[
    // batches and threads
    (&["--batch-size", "-b"], Number),
    (&["--ubatch-size", "-ub"], Number),
    (&["--threads-batch", "-tb"], Number),
    (&["--threads-http"], Number),
    (&["--prio"], Number),
    (&["--prio-batch"], Number),
    (&["--poll"], Number),
    (&["--poll-batch"], Number),
    (&["--cont-batching", "-cb"], Bare),
    (&["--no-cont-batching", "-nocb"], Bare),
    // context and its cache
    (&["--cache-type-k", "-ctk"], Word(CACHE_TYPES)),
    (&["--cache-type-v", "-ctv"], Word(CACHE_TYPES)),
    (&["--cache-reuse"], Number),
    (&["--cache-prompt"], Bare),
    (&["--no-cache-prompt"], Bare),
    (&["--context-shift"], Bare),
    (&["--no-context-shift"], Bare),
    (&["--ctx-checkpoints", "--swa-checkpoints", "-ctxcp"], Number),
    (&["--keep"], Number),
    (&["--kv-offload", "-kvo"], Bare),
    (&["--no-kv-offload", "-nkvo"], Bare),
    (&["--kv-unified", "-kvu"], Bare),
    (&["--no-kv-unified", "-no-kvu"], Bare),
    (&["--slot-prompt-similarity", "-sps"], Number),
    (&["--swa-full"], Bare),
    (&["--defrag-thold", "-dt"], Number),
    // how the model is loaded and spread
    (&["--load-mode", "-lm"], Word(&["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"])),
    (&["--mlock"], Bare),
    (&["--mmap"], Bare),
    (&["--no-mmap"], Bare),
    (&["--check-tensors"], Bare),
    (&["--repack"], Bare),
    (&["--no-repack", "-nr"], Bare),
    (&["--no-host"], Bare),
    (&["--warmup"], Bare),
    (&["--no-warmup"], Bare),
    (&["--numa"], Word(&["distribute", "isolate", "numactl"])),
    (&["--cpu-moe", "-cmoe"], Bare),
    (&["--n-cpu-moe", "-ncmoe"], Number),
    (&["--flash-attn", "-fa"], Word(SWITCH)),
    (&["--main-gpu", "-mg"], Number),
    (&["--split-mode", "-sm"], Word(&["none", "layer", "row", "tensor"])),
    (&["--tensor-split", "-ts"], Numbers),
    (&["--override-tensor", "-ot"], Text),
    (&["--override-kv"], Text),
    (&["--op-offload"], Bare),
    (&["--no-op-offload"], Bare),
    // positions
    (&["--rope-scaling"], Word(&["none", "linear", "yarn"])),
    (&["--rope-scale"], Number),
    (&["--rope-freq-base"], Number),
    (&["--rope-freq-scale"], Number),
    (&["--yarn-orig-ctx"], Number),
    (&["--yarn-ext-factor"], Number),
    (&["--yarn-attn-factor"], Number),
    (&["--yarn-beta-slow"], Number),
    (&["--yarn-beta-fast"], Number),
    // chat and reasoning
    (&["--jinja"], Bare),
    (&["--no-jinja"], Bare),
    (&["--chat-template"], Text),
    (&["--chat-template-kwargs"], Text),
    (&["--reasoning-format"], Word(&["none", "deepseek", "deepseek-legacy", "auto"])),
    (&["--reasoning", "-rea"], Word(SWITCH)),
    (&["--reasoning-budget"], Number),
    (&["--prefill-assistant"], Bare),
    (&["--no-prefill-assistant"], Bare),
    (&["--special", "-sp"], Bare),
    (&["--spm-infill"], Bare),
    // defaults of requests
    (&["--predict", "--n-predict", "-n"], Number),
    (&["--seed", "-s"], Number),
    (&["--temp", "--temperature"], Number),
    (&["--top-k"], Number),
    (&["--top-p"], Number),
    (&["--min-p"], Number),
    (&["--typical", "--typical-p"], Number),
    (&["--xtc-probability"], Number),
    (&["--xtc-threshold"], Number),
    (&["--repeat-last-n"], Number),
    (&["--repeat-penalty"], Number),
    (&["--presence-penalty"], Number),
    (&["--frequency-penalty"], Number),
    (&["--dry-multiplier"], Number),
    (&["--dry-base"], Number),
    (&["--dry-allowed-length"], Number),
    (&["--dry-penalty-last-n"], Number),
    (&["--dynatemp-range"], Number),
    (&["--dynatemp-exp"], Number),
    (&["--mirostat"], Number),
    (&["--mirostat-lr"], Number),
    (&["--mirostat-ent"], Number),
    (&["--samplers"], Text),
    (&["--ignore-eos"], Bare),
    // embeddings and ranking
    (&["--pooling"], Word(&["none", "mean", "cls", "last", "rank"])),
    (&["--embd-normalize"], Number),
    (&["--rerank", "--reranking"], Bare),
    // behaviour of the server
    (&["--timeout", "-to"], Number),
    (&["--sse-ping-interval"], Number),
    (&["--perf"], Bare),
    (&["--no-perf"], Bare),
    (&["--verbosity", "--log-verbosity", "-lv"], Number),
];

/// Flags that a field of the deployment sets, or that Drover sets itself.
const OWNED: &[(&[&str], &str)] = &[
    (&["--model", "-m"], "set the field model_path"),
    (&["--alias", "-a"], "set the field model"),
    (&["--ctx-size", "-c"], "set the field context_tokens, which counts for one slot"),
    (&["--parallel", "-np"], "set the field slots"),
    (&["--threads", "-t"], "set the field threads"),
    (&["--gpu-layers", "--n-gpu-layers", "-ngl"], "set the field gpu_layers"),
    (&["--embedding", "--embeddings"], "set the field embeddings"),
    (&["--host"], "Drover serves every instance on a unix socket of its own"),
    (&["--port"], "Drover serves every instance on a unix socket of its own"),
    (&["--metrics", "--slots", "--no-slots"], "Drover always switches both on"),
    (&["--fit", "-fit"], "Drover always switches it off, so that sizes are those asked for"),
    (&["--cache-ram", "-cram"], "Drover sets it to 0, so that an instance stays within its memory"),
    (&["--ui", "--no-ui", "--webui", "--no-webui"], "Drover always switches it off"),
    (&["--offline"], "Drover always switches it on"),
    (&["--device", "-dev"], "Drover shows an instance only the GPUs that it owns"),
];

/// Checks the further arguments of a deployment, one element a word. The error is a sentence that names the argument and
/// what would be allowed.
pub fn check(arguments: &[String]) -> Result<(), String> {
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let shown = shown(word);
        let Some(value) = lookup(word) else { return Err(refusal(word)) };
        if value == Bare {
            continue;
        }
        let Some(given) = words.next() else {
            return Err(format!("{shown} needs a value as the next element: {}", expected(value)));
        };
        if !fits(value, given) {
            return Err(format!("{shown} {}: expected {}", self::shown(given), expected(value)));
        }
    }
    Ok(())
}

/// The flags among arguments that have passed [`check`], without their values.
#[must_use]
pub fn flags(arguments: &[String]) -> Vec<&str> {
    let mut flags = Vec::new();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        flags.push(word.as_str());
        if lookup(word).is_some_and(|value| value != Bare) {
            words.next();
        }
    }
    flags
}

/// Every name of every allowed flag.
pub fn allowed() -> impl Iterator<Item = &'static str> {
    ALLOWED.iter().flat_map(|(names, _)| names.iter().copied())
}

fn lookup(word: &str) -> Option<Value> {
    ALLOWED.iter().find(|(names, _)| names.contains(&word)).map(|&(_, value)| value)
}

fn refusal(word: &str) -> String {
    let shown = shown(word);
    if let Some((_, why)) = OWNED.iter().find(|(names, _)| names.contains(&word)) {
        return format!("{shown} is not to be given here: {why}");
    }
    if let Some((flag, _)) = word.split_once('=').filter(|(flag, _)| lookup(flag).is_some()) {
        return format!("{shown}: give flag and value as two elements, {flag:?} and the value");
    }
    let mut text = format!("{shown} is not allowed; allowed are ");
    for (i, (names, _)) in ALLOWED.iter().enumerate() {
        let comma = if i == 0 { "" } else { ", " };
        let _ = write!(text, "{comma}{}", names[0]);
    }
    text
}

fn fits(value: Value, given: &str) -> bool {
    let number = |text: &str| text.len() <= 32 && text.parse::<f64>().is_ok_and(f64::is_finite);
    match value {
        Bare => false,
        Number => number(given),
        Numbers => given.split(',').all(number),
        Word(words) => words.contains(&given),
        Text => !given.is_empty() && given.len() <= BYTES_MAX && !given.contains('\0') && !given.starts_with('-'),
    }
}

fn expected(value: Value) -> String {
    match value {
        Bare => "nothing".to_owned(),
        Number => "a number".to_owned(),
        Numbers => "numbers with commas between them".to_owned(),
        Word(words) => format!("one of {}", words.join(", ")),
        Text => format!("a text of 1 to {BYTES_MAX} bytes that does not begin with '-'"),
    }
}

/// A word as it is shown in messages: quoted, escaped, cut.
fn shown(word: &str) -> String {
    let cut: String = word.chars().take(64).collect();
    let dots = if cut.len() < word.len() { "…" } else { "" };
    format!("\"{}{dots}\"", cut.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_words(words: &[&str]) -> Result<(), String> {
        check(&words.iter().map(|&w| w.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn what_is_on_the_list_passes_with_the_value_that_it_needs() {
        check_words(&[]).unwrap();
        check_words(&["--no-mmap", "-ctk", "q8_0", "--temp", "-0.5", "--tensor-split", "3,1", "--jinja"]).unwrap();
        for (words, part) in [
            (&["--temp"][..], "needs a value"),
            (&["--temp", "hot"], "a number"),
            (&["--temp", "nan"], "a number"),
            (&["-ctk", "q3"], "one of f32, f16"),
            (&["--temp=1"], "two elements"),
            (&["--chat-template", "--tools"], "does not begin with '-'"),
            (&["-c", "1"], "context_tokens"),
            (&["stray"], "\"stray\" is not allowed; allowed are --batch-size"),
        ] {
            let error = check_words(words).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    /// From the list of flags that execute, fetch, read or write files, open ports or carry secrets.
    #[test]
    fn nothing_dangerous_is_on_the_list() {
        for flag in [
            "--tools",
            "--agent",
            "-ag",
            "--mcp-servers-config",
            "--mcp-servers-json",
            "--tools-runtime",
            "--video-ffmpeg-dir",
            "--rpc",
            "--media-path",
            "--path",
            "--slot-save-path",
            "--log-file",
            "--grammar-file",
            "--json-schema-file",
            "--chat-template-file",
            "--api-key",
            "--api-key-file",
            "--ssl-key-file",
            "--ssl-cert-file",
            "--ui-config-file",
            "--model-url",
            "-mu",
            "-hf",
            "--hf-repo",
            "-hff",
            "--hf-token",
            "--docker-repo",
            "-dr",
            "--lora",
            "--lora-scaled",
            "--control-vector",
            "--mmproj",
            "--mmproj-url",
            "--ui-mcp-proxy",
            "--host",
            "--port",
            "--models-dir",
            "--models-preset",
            "--log-prompts-dir",
            "--props",
            "-lcs",
            "-lcd",
            "--model-draft",
            "-md",
            "--spec-draft-hf",
            "--cors-origins",
            "--reuse-port",
            "--embd-gemma-default",
            "--gpt-oss-20b-default",
            "--completion-bash",
            "--version",
            "--help",
            "-h",
        ] {
            assert!(check_words(&[flag, "1"]).is_err(), "{flag} is allowed");
        }
        assert!(allowed().all(|f| !f.ends_with("-file") && !f.ends_with("-dir") && !f.ends_with("-path")));
    }

    #[test]
    fn a_word_in_an_error_is_escaped_and_cut() {
        let error = check_words(&[&format!("\u{1b}[2J{}", "x".repeat(100))]).unwrap_err();
        assert!(!error.contains('\u{1b}') && error.contains('…'), "{error}");
    }

    #[test]
    fn values_are_no_flags() {
        let words = ["--temp", "-1", "--jinja", "--chat-template", "chatml"].map(str::to_owned);
        assert_eq!(flags(&words), ["--temp", "--jinja", "--chat-template"]);
    }
}
