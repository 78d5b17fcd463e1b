//! Where contracts come from: the working tree, and the commits that git has. Owns every call of git; compares nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fmt, fs};

use anyhow::{Context as _, Result, bail, ensure};
use prost_types::FileDescriptorSet;
use protox::Compiler;
use protox::file::{ChainFileResolver, File, FileResolver, GoogleFileResolver};

/// The root of imports.
const IMPORTS: &str = "proto";
/// What is compared.
const CONTRACT: &str = "proto/drover";
/// The file whose addition declares the contract stable.
const SINCE: &str = "proto/contract-since";

/// The `.proto` files of one moment, by their import path (`drover/v1/fleet.proto`).
#[derive(Debug, Default)]
pub struct Contract(pub BTreeMap<String, String>);

impl Contract {
    /// The descriptors of the files below `drover/`; the others are there to be imported.
    ///
    /// # Errors
    /// What the compiler objects to, with file and line.
    pub fn compile(&self) -> Result<FileDescriptorSet> {
        let mut resolver = ChainFileResolver::new();
        resolver.add(InMemory(self.0.clone()));
        resolver.add(GoogleFileResolver::new());
        let mut compiler = Compiler::with_file_resolver(resolver);
        compiler.include_imports(false);
        for name in self.0.keys().filter(|name| name.starts_with("drover/")) {
            compiler.open_file(name).map_err(|error| anyhow::anyhow!("{error:?}"))?;
        }
        Ok(compiler.file_descriptor_set())
    }
}

struct InMemory(BTreeMap<String, String>);

impl FileResolver for InMemory {
    fn open_file(&self, name: &str) -> Result<File, protox::Error> {
        let source = self.0.get(name).ok_or_else(|| protox::Error::file_not_found(name))?;
        File::from_source(name, source)
    }
}

/// A commit, shown by its short hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit(String);

impl fmt::Display for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "commit {}", self.0.get(..10).unwrap_or(&self.0))
    }
}

/// The commits to compare with, oldest first, and what a reader should know about the choice.
#[derive(Debug, Default)]
pub struct Past {
    /// One commit for each different state of the contract.
    pub commits: Vec<Commit>,
    /// What could not be compared, and why.
    pub remarks: Vec<String>,
}

/// A git repository with a working tree.
#[derive(Debug)]
pub struct Repository {
    root: PathBuf,
}

impl Repository {
    /// The repository that `folder` is in.
    ///
    /// # Errors
    /// Where `folder` is in none, or there is no git.
    pub fn open(folder: &Path) -> Result<Self> {
        let top = git(folder, &["rev-parse", "--show-toplevel"])?;
        Ok(Self { root: PathBuf::from(top.trim()) })
    }

    /// The contract as it lies on the disk, committed or not.
    ///
    /// # Errors
    /// Where a file cannot be read, or there is none.
    pub fn working_tree(&self) -> Result<Contract> {
        let mut files = BTreeMap::new();
        let imports = self.root.join(IMPORTS);
        read_protos(&imports, &imports, &mut files)?;
        ensure!(files.keys().any(|name| name.starts_with("drover/")), "there is no .proto file below {CONTRACT}");
        Ok(Contract(files))
    }

    /// The commit that `reference` names.
    ///
    /// # Errors
    /// Where it names none in this clone.
    pub fn commit(&self, reference: &str) -> Result<Commit> {
        let hash = git(&self.root, &["rev-parse", "--verify", "--quiet", &format!("{reference}^{{commit}}")])
            .with_context(|| format!("no commit is named '{reference}' in this clone; fetch it first"))?;
        Ok(Commit(hash.trim().to_owned()))
    }

    /// The contract as `commit` has it.
    ///
    /// # Errors
    /// Where git cannot read it.
    pub fn contract_of(&self, commit: &Commit) -> Result<Contract> {
        let listing = git(&self.root, &["ls-tree", "-r", "-z", "--name-only", &commit.0, "--", IMPORTS])?;
        let mut files = BTreeMap::new();
        for path in listing.split('\0').filter(|path| path.ends_with(".proto")) {
            let source = git(&self.root, &["show", &format!("{}:{path}", commit.0)])?;
            let name = path.strip_prefix(IMPORTS).unwrap_or(path).trim_start_matches('/');
            files.insert(name.to_owned(), source);
        }
        Ok(Contract(files))
    }

    /// Every different state of the contract since it was declared stable.
    ///
    /// # Errors
    /// Where git fails.
    pub fn past(&self) -> Result<Past> {
        let mut past = Past::default();
        if !self.root.join(SINCE).exists() {
            past.remarks.push(format!("not declared stable: there is no {SINCE}, so any change is allowed"));
            return Ok(past);
        }
        if git(&self.root, &["rev-parse", "--verify", "--quiet", "HEAD"]).is_err() {
            past.remarks.push("there is no commit yet to compare with".to_owned());
            return Ok(past);
        }
        let first_parents = ["log", "--first-parent", "--format=%H"];
        let added = git(&self.root, &[&first_parents[..], &["--diff-filter=A", "-1", "--", SINCE]].concat())?;
        let added = added.trim();
        if added.is_empty() {
            past.remarks
                .push(format!("{SINCE} is not committed yet: the commit that adds it is the first that counts"));
            return Ok(past);
        }
        if git(&self.root, &["rev-parse", "--is-shallow-repository"])?.trim() == "true" {
            past.remarks.push(format!(
                "this clone is shallow: nothing before {} was compared; for all of it: git fetch --unshallow",
                Commit(added.to_owned())
            ));
        }
        let later =
            git(&self.root, &[&first_parents[..], &["--reverse", &format!("{added}..HEAD"), "--", CONTRACT]].concat())?;
        let mut seen = Vec::new();
        for hash in std::iter::once(added).chain(later.lines()) {
            // A commit without the contract has no tree there.
            let Ok(tree) = git(&self.root, &["rev-parse", "--verify", "--quiet", &format!("{hash}:{CONTRACT}")]) else {
                continue;
            };
            if !seen.contains(&tree) {
                seen.push(tree);
                past.commits.push(Commit(hash.to_owned()));
            }
        }
        Ok(past)
    }
}

fn read_protos(imports: &Path, folder: &Path, files: &mut BTreeMap<String, String>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read the folder {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            read_protos(imports, &path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "proto") {
            let source = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            files.insert(path.strip_prefix(imports)?.to_string_lossy().into_owned(), source);
        }
    }
    Ok(())
}

fn git(folder: &Path, arguments: &[&str]) -> Result<String> {
    #[allow(clippy::disallowed_methods, reason = "git is the one program that knows the past of the contract")]
    let output = Command::new("git")
        .arg("-C")
        .arg(folder)
        .args(arguments)
        .output()
        .context("cannot run git, which the check of the contract reads earlier states with")?;
    if !output.status.success() {
        bail!("git {} failed: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
