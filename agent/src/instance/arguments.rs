//! llama-server's command line and environment: the only module that knows its flags.
//!
//! Built from a deployment's typed fields and its checked further arguments ([`drover_proto::arguments`]). What the
//! installed program's `--help` does not know is left out where Drover can do without, and refused where the deployment
//! asked for it.

use drover_proto::{arguments as allowed, limits::defaults, v1::DeploymentSpec};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// Flags that the installed llama-server knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known(BTreeSet<String>);

impl Known {
    /// Reads them from the text that `--help` prints.
    #[must_use]
    pub fn parse(help: &str) -> Self {
        let starts = help.lines().filter(|line| line.starts_with('-') && !line.starts_with("-----"));
        // "-m,    --model FNAME   text": flags come first, with commas between them; a word that is none ends them.
        let names = starts.flat_map(|line| {
            line.split_whitespace().map(|word| word.trim_end_matches(',')).take_while(|word| word.starts_with('-'))
        });
        Self(names.map(str::to_owned).collect())
    }

    /// Whether it knows a flag.
    #[must_use]
    pub fn has(&self, flag: &str) -> bool {
        self.0.contains(flag)
    }

    /// True when the text had no flags at all: then it was no help text.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What is to be served where.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Model file, resolved.
    pub model: &'a Path,
    /// Unix socket; its name must end with ".sock", or llama-server takes it for a host name.
    pub socket: &'a Path,
    /// UUIDs of the GPUs that it may see.
    pub gpus: &'a [String],
}

/// Model name that clients use: the deployment's, unless it names another.
#[must_use]
pub fn alias(spec: &DeploymentSpec) -> &str {
    if spec.model.is_empty() { &spec.name } else { &spec.model }
}

/// The arguments, without the program's name. The error names field, value and way out.
pub fn build(spec: &DeploymentSpec, place: Place<'_>, known: &Known) -> Result<Vec<String>, String> {
    allowed::check(&spec.arguments).map_err(|e| format!("arguments: {e}"))?;
    if let Some(flag) = allowed::flags(&spec.arguments).into_iter().find(|flag| !known.has(flag)) {
        return Err(format!(
            "arguments: \"{flag}\" is not known to the llama-server of this node: leave it out or install a version that has it"
        ));
    }
    let slots = i64::from(spec.slots.unwrap_or(defaults::SLOTS));
    let context = i64::from(spec.context_tokens.unwrap_or(defaults::CONTEXT_TOKENS)) * slots;
    let gpu_layers = spec.gpu_layers.unwrap_or(if place.gpus.is_empty() { 0 } else { 999 });
    let mut words = Words(Vec::new());
    words.pair("--model", place.model.display());
    words.pair("--alias", alias(spec));
    words.pair("--host", place.socket.display());
    words.pair("--ctx-size", context);
    words.pair("--parallel", slots);
    words.pair("--n-gpu-layers", gpu_layers);
    if let Some(threads) = spec.threads {
        words.pair("--threads", threads);
    }
    if spec.embeddings {
        words.flag("--embeddings");
    }
    words.flag("--metrics");
    if known.has("--slots") {
        words.flag("--slots");
    }
    if known.has("--fit") {
        // It would silently cut the context or move layers to the CPU.
        words.pair("--fit", "off");
    }
    if known.has("--cache-ram") {
        // It would take 8 GiB of the host's memory beside what the instance reserves.
        words.pair("--cache-ram", 0);
    }
    if let Some(no_page) = ["--no-ui", "--no-webui"].into_iter().find(|flag| known.has(flag)) {
        words.flag(no_page);
    }
    if known.has("--offline") {
        words.flag("--offline");
    }
    words.0.extend(spec.arguments.iter().cloned());
    Ok(words.0)
}

struct Words(Vec<String>);

impl Words {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.to_owned());
    }

    fn pair(&mut self, flag: &str, value: impl ToString) {
        self.0.extend([flag.to_owned(), value.to_string()]);
    }
}

/// The whole environment of a server: built up, nothing inherited. Every `LLAMA_ARG_*` would be an argument that nobody
/// checked.
#[must_use]
pub fn environment(gpus: &[String], home: &Path, configured: &BTreeMap<String, String>) -> Vec<(String, String)> {
    let mut environment = BTreeMap::from([
        ("PATH".to_owned(), "/usr/local/bin:/usr/bin:/bin".to_owned()),
        ("LANG".to_owned(), "C.UTF-8".to_owned()),
        ("HOME".to_owned(), home.display().to_string()),
    ]);
    environment.extend(configured.clone());
    // Not to be configured: which GPUs a server sees follows from what it owns. Indices would renumber, UUIDs don't.
    environment.insert("CUDA_VISIBLE_DEVICES".to_owned(), gpus.join(","));
    environment.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELP: &str = "----- common params -----\n\n-h,    --help, --usage   print usage\n\
        -m,    --model FNAME    model path\n-fit,  --fit [on|off]   whether\n--metrics   enable\n--slots, --no-slots   expose\n\
        \x20       --hidden in a text\n-cram, --cache-ram N  set\n--ui,  --webui, --no-ui, --no-webui  whether\n-ctk, --cache-type-k TYPE x\n";

    fn place<'a>(gpus: &'a [String]) -> Place<'a> {
        Place { model: Path::new("/models/a.gguf"), socket: Path::new("/run/a.sock"), gpus }
    }

    #[test]
    fn flags_are_read_from_the_help_text() {
        let known = Known::parse(HELP);
        assert!(["-h", "--usage", "-m", "--fit", "--no-slots", "-cram", "--no-webui"].iter().all(|f| known.has(f)));
        assert!(!known.has("--hidden") && !known.has("[on|off]") && !known.has("-----"));
        assert!(Known::parse("error: no such program").is_empty());
    }

    #[test]
    fn every_field_has_its_flag_and_sizes_are_fixed() {
        let spec = DeploymentSpec {
            name: "tiny".to_owned(),
            slots: Some(3),
            context_tokens: Some(1000),
            threads: Some(2),
            embeddings: true,
            arguments: vec!["-ctk".to_owned(), "q8_0".to_owned()],
            ..DeploymentSpec::default()
        };
        let words = build(&spec, place(&[]), &Known::parse(HELP)).unwrap().join(" ");
        assert_eq!(
            words,
            "--model /models/a.gguf --alias tiny --host /run/a.sock --ctx-size 3000 --parallel 3 --n-gpu-layers 0 \
             --threads 2 --embeddings --metrics --slots --fit off --cache-ram 0 --no-ui -ctk q8_0"
        );
        let gpus = ["GPU-1".to_owned()];
        assert!(build(&spec, place(&gpus), &Known::parse(HELP)).unwrap().join(" ").contains("--n-gpu-layers 999"));
    }

    #[test]
    fn what_is_not_allowed_or_not_known_is_refused() {
        let spec = |words: &[&str]| DeploymentSpec {
            arguments: words.iter().map(|&w| w.to_owned()).collect(),
            ..DeploymentSpec::default()
        };
        let error = |words| build(&spec(words), place(&[]), &Known::parse(HELP)).unwrap_err();
        assert!(error(&["--tools", "all"]).starts_with("arguments: \"--tools\" is not allowed"));
        assert!(error(&["--no-mmap"]).contains("not known to the llama-server of this node"));
    }

    #[test]
    fn the_environment_holds_what_is_said_and_nothing_else() {
        let configured = BTreeMap::from([("LD_LIBRARY_PATH".to_owned(), "/opt/cuda".to_owned())]);
        let environment = environment(&["GPU-1".to_owned(), "GPU-2".to_owned()], Path::new("/i"), &configured);
        let names: Vec<&str> = environment.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["CUDA_VISIBLE_DEVICES", "HOME", "LANG", "LD_LIBRARY_PATH", "PATH"]);
        assert_eq!(environment[0].1, "GPU-1,GPU-2");
    }
}
