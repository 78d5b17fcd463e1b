//! What is on disk of an instance, and which process that speaks of. Reads only: adoption acts on it, and
//! `drover-agent check` tells it.

use super::claim::{self, Claim};
use drover_proto::v1::DeploymentSpec;
use drover_shim::{
    durable,
    identity::{self, Process},
    record::{self, Directory, Exit, LEASED_FORMAT, RECORD_FORMAT, Record, Spec, Stage, Token},
};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The files of an instance's directory, as they are.
#[derive(Debug)]
pub struct Traces {
    /// Id of the instance.
    pub instance: String,
    /// Its directory.
    pub directory: Directory,
    /// What was to start.
    pub spec: Result<Spec, durable::Error>,
    /// What was started.
    pub record: Result<Record, durable::Error>,
    /// What is to run.
    pub claim: Result<Claim, durable::Error>,
    /// How it ended.
    pub exit: Result<Exit, durable::Error>,
}

impl Traces {
    /// Reads the files.
    #[must_use]
    pub fn read(instances_dir: &Path, instance: &str) -> Self {
        let directory = Directory::new(instances_dir.join(instance));
        Self {
            instance: instance.to_owned(),
            spec: record::read(&directory.spec()),
            record: record::read(&directory.record()),
            claim: Claim::read(directory.path()),
            exit: record::read(&directory.exit()),
            directory,
        }
    }

    /// Files that are there and can't be used, each with the reason.
    #[must_use]
    pub fn unusable(&self) -> Vec<(PathBuf, &durable::Error)> {
        let all = [
            (self.directory.spec(), self.spec.as_ref().err()),
            (self.directory.record(), self.record.as_ref().err()),
            (claim::path(self.directory.path()), self.claim.as_ref().err()),
            (self.directory.exit(), self.exit.as_ref().err()),
        ];
        let there = all.into_iter().filter_map(|(path, error)| Some((path, error?)));
        there.filter(|(_, error)| !matches!(error, durable::Error::Missing(_))).collect()
    }

    /// Why it can't be known what runs: spec or record are there and can't be read, or a newer version has written them. One
    /// that is damaged is as good as absent.
    #[must_use]
    pub fn unread(&self) -> Option<&durable::Error> {
        let mut errors = [self.spec.as_ref().err(), self.record.as_ref().err()].into_iter().flatten();
        errors.find(|error| !error.is_damage() && !matches!(error, durable::Error::Missing(_)))
    }

    /// Looks for the server whose record is lost: only a program of ours listens on the socket that belongs to this
    /// instance. The record bears the highest token that is left on disk: a lower one would let an overtaken start begin.
    #[must_use]
    pub fn rebuilt(&self, socket: &Path, llama_server: &Path, shim: &Path) -> Option<Record> {
        let claimed = self.claim.as_ref().ok().map(|claim| claim::stored_token(claim.token));
        let token = self.spec.as_ref().ok().map(|spec| spec.token).max(claimed);
        let (process, arguments) = serves(socket, llama_server)?;
        let ends_with_lease = self.spec.as_ref().is_ok_and(|spec| spec.ends_with_lease);
        Some(Record {
            format: if ends_with_lease { LEASED_FORMAT } else { RECORD_FORMAT },
            instance: self.instance.clone(),
            token: token.unwrap_or(Token { generation: 0, revision: 0 }),
            stage: Stage::Released,
            process,
            shim: shim.to_owned(),
            arguments,
            socket: socket.to_owned(),
            started_at_ms: 0,
            cgroup: None,
        })
    }

    /// The claim, with the highest token on disk. What is missing comes back with the set of claims; until then the run is
    /// known by what else there is.
    #[must_use]
    pub fn claim(&self, record: Option<&Record>) -> Claim {
        let tokens = [self.spec.as_ref().ok().map(|s| s.token), record.map(|r| r.token)];
        let mut claim = self.claim.as_ref().ok().cloned().unwrap_or_else(|| Claim {
            instance: self.instance.clone(),
            token: Default::default(),
            spec: DeploymentSpec {
                name: self.instance.rsplit_once('-').map_or(self.instance.as_str(), |(name, _)| name).to_owned(),
                ..DeploymentSpec::default()
            },
            revision: 0,
            memory_bytes: 0,
            restarts: 0,
            failed: None,
            since: None,
        });
        claim.token = tokens.into_iter().flatten().map(claim::token).fold(claim.token, Ord::max);
        claim
    }
}

/// The model that a server was started with.
#[must_use]
pub fn model(arguments: &[String]) -> PathBuf {
    let model = arguments.iter().skip_while(|word| *word != "--model").nth(1);
    PathBuf::from(model.map(String::as_str).unwrap_or_default())
}

/// The process that executes a program and was given this socket to listen on, with its arguments.
#[must_use]
pub fn serves(socket: &Path, program: &Path) -> Option<(Process, Vec<String>)> {
    let (name, program) = (socket.to_str()?, fs::canonicalize(program).ok()?);
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let words: Vec<String> = line.split(|&b| b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
        let listens = words.windows(2).any(|pair| pair[0] == "--host" && pair[1] == name);
        let (Ok(stat), Ok(executable)) = (identity::stat(pid), identity::executable(pid)) else { continue };
        if !listens || executable != program || stat.state == 'Z' {
            continue;
        }
        let process = Process {
            boot_id: identity::boot_id().ok()?,
            pid,
            start_ticks: stat.start_ticks,
            executable,
            file: identity::executable_file(pid).ok(),
        };
        let end = words.len().saturating_sub(1);
        return Some((process, words.get(1..end).unwrap_or_default().to_vec()));
    }
    None
}
