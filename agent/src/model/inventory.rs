//! Which model files a node has: coordinators plan with it, so that nothing is offered to a node that can't serve it.

use drover_proto::v1::{ModelFile, ModelInventory};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Most files that are listed.
pub const FILES_MAX: usize = 4096;
/// How deep folders are followed below a root.
const DEPTH_MAX: usize = 8;
/// Most folder entries that one scan looks at.
const ENTRIES_MAX: usize = 100_000;

/// Lists the GGUF files below the roots, which must be real paths. What can't be read is left out.
#[must_use]
pub fn scan(roots: &[PathBuf]) -> ModelInventory {
    let mut scan = Scan { roots, files: BTreeMap::new(), entries: 0, truncated: false };
    for root in roots {
        scan.folder(root, DEPTH_MAX);
    }
    ModelInventory {
        roots: roots.iter().map(|root| root.display().to_string()).collect(),
        files: scan
            .files
            .into_iter()
            .map(|(path, size)| ModelFile { path, size_bytes: i64::try_from(size).unwrap_or(i64::MAX) })
            .collect(),
        truncated: scan.truncated,
    }
}

struct Scan<'a> {
    roots: &'a [PathBuf],
    files: BTreeMap<String, u64>,
    entries: usize,
    truncated: bool,
}

impl Scan<'_> {
    fn folder(&mut self, folder: &Path, depth: usize) {
        let Ok(entries) = fs::read_dir(folder) else { return };
        for entry in entries.flatten() {
            self.entries += 1;
            if self.entries > ENTRIES_MAX || self.files.len() >= FILES_MAX {
                self.truncated = true;
                return;
            }
            let path = entry.path();
            // Follows links: what they lead to counts by its real path, and only below a root.
            let Ok(meta) = fs::metadata(&path) else { continue };
            if meta.is_dir() {
                let is_link = entry.file_type().is_ok_and(|t| t.is_symlink());
                if depth == 0 {
                    self.truncated = true;
                } else if !is_link {
                    self.folder(&path, depth - 1);
                }
            } else if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
                && let Ok(real) = fs::canonicalize(&path)
                && self.roots.iter().any(|root| real.starts_with(root))
                && let Some(real) = real.to_str()
            {
                self.files.insert(real.to_owned(), meta.len());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, os::unix::fs::symlink};

    #[test]
    fn files_below_the_roots_are_listed_by_their_real_path_and_none_beyond() {
        let place = tempfile::tempdir().unwrap();
        let base = fs::canonicalize(place.path()).unwrap();
        let root = base.join("models");
        fs::create_dir_all(root.join("deep/er")).unwrap();
        for name in ["models/a.gguf", "models/deep/er/b.GGUF", "models/c.txt", "away.gguf"] {
            File::create(base.join(name)).unwrap();
        }
        symlink(base.join("away.gguf"), root.join("link.gguf")).unwrap();
        symlink(root.join("a.gguf"), root.join("again.gguf")).unwrap();
        symlink(&root, root.join("deep/loop")).unwrap();
        let inventory = scan(std::slice::from_ref(&root));
        let names: Vec<_> =
            inventory.files.iter().map(|f| f.path.strip_prefix(root.to_str().unwrap()).unwrap()).collect();
        assert_eq!(names, ["/a.gguf", "/deep/er/b.GGUF"]);
        assert!(!inventory.truncated);
    }
}
