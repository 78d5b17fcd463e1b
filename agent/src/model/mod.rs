//! Model files: where they may lie, whether they are GGUF, what they need.
//!
//! A model is opened below one of the configured roots only, symbolic links resolved first. Must never: write, or read a
//! file outside the roots.

pub mod gguf;
pub mod inventory;

use drover_proto::{limits::defaults, v1::DeploymentSpec};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// A model file that may be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// Real path, symbolic links resolved.
    pub path: PathBuf,
    /// Size of all its parts, in bytes.
    pub bytes: u64,
}

/// Why a model can't be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such file.
    #[error("model_path \"{path}\" is not below any model root of this node ({roots}): put the file there")]
    Missing {
        /// As given.
        path: String,
        /// The roots.
        roots: String,
    },
    /// It lies elsewhere.
    #[error(
        "model_path \"{path}\" leads to {real}, which is outside the model roots of this node ({roots}): move the file \
         or add its folder to model_roots"
    )]
    Outside {
        /// As given.
        path: String,
        /// Where it leads.
        real: PathBuf,
        /// The roots.
        roots: String,
    },
    /// The operating system refused.
    #[error("model_path \"{path}\": {source}")]
    Unreadable {
        /// As given.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// It is no model file.
    #[error("model_path \"{path}\" is no usable GGUF file: {what}")]
    NotGguf {
        /// As given.
        path: String,
        /// What is wrong with it.
        what: String,
    },
}

/// Finds the model of a deployment below the roots, which must be real paths, and checks its header.
pub fn resolve(model_path: &str, roots: &[PathBuf]) -> Result<Model, Error> {
    let shown = model_path.escape_debug().to_string();
    let listed = || roots.iter().map(|r| r.display().to_string()).collect::<Vec<_>>().join(", ");
    let given = Path::new(model_path);
    let candidates: Vec<PathBuf> =
        if given.is_absolute() { vec![given.to_owned()] } else { roots.iter().map(|root| root.join(given)).collect() };
    let mut outside = None;
    for candidate in candidates {
        let real = match fs::canonicalize(&candidate) {
            Ok(real) => real,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => continue,
            Err(source) => return Err(Error::Unreadable { path: shown, source }),
        };
        if roots.iter().any(|root| real.starts_with(root)) {
            return check(&real).map_err(|what| Error::NotGguf { path: shown, what });
        }
        outside.get_or_insert(real);
    }
    Err(match outside {
        Some(real) => Error::Outside { path: shown, real, roots: listed() },
        None => Error::Missing { path: shown, roots: listed() },
    })
}

fn check(real: &Path) -> Result<Model, String> {
    let meta = fs::metadata(real).map_err(|e| e.to_string())?;
    if !meta.is_file() {
        return Err("it is no regular file".to_owned());
    }
    gguf::check(real, meta.len())?;
    let bytes = parts(real).iter().map(|part| fs::metadata(part).map(|m| m.len())).sum::<io::Result<u64>>();
    let bytes = bytes.map_err(|e| format!("a part of the split model is missing: {e}"))?;
    Ok(Model { path: real.to_owned(), bytes })
}

/// The files of a split model ("x-00001-of-00003.gguf"); of any other, the file itself.
fn parts(path: &Path) -> Vec<PathBuf> {
    let split = || {
        let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (head, total) = stem.rsplit_once("-of-")?;
        let (name, number) = head.rsplit_once('-')?;
        let count: u32 = total.parse().ok()?;
        let plausible =
            number.len() == 5 && total.len() == 5 && number.parse::<u32>().is_ok() && (1..=1000).contains(&count);
        plausible.then(|| (1..=count).map(|n| path.with_file_name(format!("{name}-{n:05}-of-{total}.gguf"))).collect())
    };
    split().unwrap_or_else(|| vec![path.to_owned()])
}

/// Memory that an instance reserves, in bytes: what the deployment names, or the model's size and an overhead.
#[must_use]
pub fn memory_bytes(spec: &DeploymentSpec, model: &Model) -> i64 {
    spec.memory_bytes.unwrap_or_else(|| {
        i64::try_from(model.bytes).unwrap_or(i64::MAX).saturating_add(defaults::MEMORY_OVERHEAD_BYTES)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, io::Write as _, os::unix::fs::symlink};

    fn header() -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend(10_u64.to_le_bytes());
        bytes.extend(5_u64.to_le_bytes());
        bytes.resize(4096, 0);
        bytes
    }

    fn put(path: &Path, bytes: &[u8]) {
        File::create(path).unwrap().write_all(bytes).unwrap();
    }

    #[test]
    fn a_model_is_found_below_a_root_only_wherever_links_lead() {
        let place = tempfile::tempdir().unwrap();
        let base = fs::canonicalize(place.path()).unwrap();
        let (root, other) = (base.join("models"), base.join("other"));
        fs::create_dir(&root).unwrap();
        fs::create_dir(&other).unwrap();
        put(&root.join("a.gguf"), &header());
        put(&other.join("b.gguf"), &header());
        symlink(root.join("a.gguf"), other.join("inward.gguf")).unwrap();
        symlink(other.join("b.gguf"), root.join("outward.gguf")).unwrap();
        let roots = [root.clone()];
        let expected = Model { path: root.join("a.gguf"), bytes: 4096 };
        assert_eq!(resolve("a.gguf", &roots).unwrap(), expected);
        assert_eq!(resolve(root.join("a.gguf").to_str().unwrap(), &roots).unwrap(), expected);
        assert_eq!(resolve(other.join("inward.gguf").to_str().unwrap(), &roots).unwrap(), expected);
        for path in ["outward.gguf", "../other/b.gguf", other.join("b.gguf").to_str().unwrap()] {
            let error = resolve(path, &roots).unwrap_err();
            assert!(matches!(error, Error::Outside { .. }), "{path}: {error}");
            assert!(error.to_string().contains(root.to_str().unwrap()) && error.to_string().contains(path), "{error}");
        }
        let error = resolve("none.gguf", &roots).unwrap_err();
        assert!(matches!(error, Error::Missing { .. }) && error.to_string().contains("none.gguf"), "{error}");
        assert!(matches!(resolve("a.gguf/x", &roots), Err(Error::Missing { .. })));
        assert!(matches!(resolve(root.to_str().unwrap(), &roots), Err(Error::NotGguf { .. })));
    }

    #[test]
    fn a_split_model_counts_with_all_its_parts_or_not_at_all() {
        let place = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(place.path()).unwrap();
        put(&root.join("m-00001-of-00002.gguf"), &header());
        let error = resolve("m-00001-of-00002.gguf", std::slice::from_ref(&root)).unwrap_err();
        assert!(error.to_string().contains("part of the split model is missing"), "{error}");
        put(&root.join("m-00002-of-00002.gguf"), &[0; 100]);
        assert_eq!(resolve("m-00001-of-00002.gguf", &[root]).unwrap().bytes, 4196);
    }
}
