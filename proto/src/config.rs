//! How a program's configuration is read: a TOML file first, then environment variables `DROVER_…`, then flags.
//!
//! A program declares a struct with `#[serde(default, deny_unknown_fields)]`; this module reads the file into it and names
//! file, line and key of whatever is wrong. Environment and flags are laid over it by clap in the program itself.

use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// Why a configuration file was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It can't be read.
    #[error("configuration file {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A key is unknown or a value has the wrong form.
    #[error("configuration file {path}, line {line}: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong there, with the key and what would be allowed.
        message: String,
    },
}

/// Reads a configuration file; without a path, the defaults.
pub fn load<T: DeserializeOwned + Default>(path: Option<&Path>) -> Result<T, Error> {
    let Some(path) = path else { return Ok(T::default()) };
    let text = std::fs::read_to_string(path).map_err(|source| Error::Unreadable { path: path.to_owned(), source })?;
    parse(path, &text)
}

/// Reads the text of a configuration file; `path` is only named in errors.
pub fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, Error> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start.min(text.len()));
        let line = text.as_bytes()[..start].iter().filter(|&&b| b == b'\n').count() + 1;
        let key = text.lines().nth(line - 1).unwrap_or_default().trim();
        Error::Malformed { path: path.to_owned(), line, message: format!("{} (at `{key}`)", error.message()) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, serde::Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Sample {
        listen: String,
        inner: Inner,
    }

    #[derive(Debug, Default, serde::Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Inner {
        size: u32,
    }

    #[test]
    fn an_unknown_key_is_named_with_file_and_line() {
        let path = Path::new("/etc/drover/x.toml");
        let error = parse::<Sample>(path, "listen = 'a'\n[inner]\nsize = 1\nsise = 2\n").unwrap_err().to_string();
        assert!(error.contains("/etc/drover/x.toml, line 4"), "{error}");
        assert!(error.contains("sise") && error.contains("size"), "{error}");
        let error = parse::<Sample>(path, "[inner]\nsize = 'many'\n").unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        let sample = parse::<Sample>(path, "listen = 'a'\n[inner]\nsize = 1\n").unwrap();
        assert_eq!((sample.listen.as_str(), sample.inner.size), ("a", 1));
    }
}
