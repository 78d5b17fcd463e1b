//! What earlier agents left: living servers are taken back, ended ones settled, damaged files set aside and named.
//!
//! Losing contact is not losing the process: nothing found here is ended. A process is taken back only when its whole
//! identity matches its record.

use super::{
    claim::Claim,
    context::Context,
    health,
    run::{self, Run},
    state::Ended,
};
use crate::host::processes::{self, Found};
use drover_proto::{
    ids,
    v1::{DeploymentSpec, Severity},
};
use drover_shim::{
    Refusal, durable,
    failpoint::{self, Step},
    identity::{self, Process},
    record::{Directory, FORMAT, Record, Spec, Stage, Token},
    start,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// What an instance's directory says.
#[derive(Debug)]
pub enum Left {
    /// Its server lives.
    Living {
        /// The process.
        run: Run,
        /// Whether it answers, for the model that it was started with.
        ready: bool,
    },
    /// Its server has ended, or was never started.
    Ended(Option<Ended>),
    /// It can't be told whether its server lives: it is left alone, and nothing is started in its place.
    Unknown(String),
}

/// The claims and runs that earlier agents left.
pub async fn scan(context: &Arc<Context>) -> io::Result<Vec<(Claim, Directory, Left)>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(context.settings.instances_dir())? {
        match entry?.file_name().into_string() {
            Ok(name) if ids::check_instance_id(&name).is_ok() => names.push(name),
            other => tracing::warn!(?other, "the folder of instances has an entry that is none of ours"),
        }
    }
    names.sort();
    // Each look waits for an answer of a server at most as long as a probe may take: all at the same time.
    let looks = names.into_iter().map(|name| look(context.clone(), name));
    Ok(futures::future::join_all(looks).await)
}

/// Looks at one instance.
pub async fn look(context: Arc<Context>, instance: String) -> (Claim, Directory, Left) {
    let directory = Directory::new(context.settings.instances_dir().join(&instance));
    let spec: Option<Spec> = read(&context, &instance, &directory.spec());
    let mut record: Option<Record> = read(&context, &instance, &directory.record());
    if record.is_none() {
        // The highest token that is left on disk: a lower one would let an overtaken start begin.
        let claimed = Claim::read(directory.path()).ok().map(|claim| super::claim::stored_token(claim.token));
        let token = spec.as_ref().map(|spec| spec.token).max(claimed);
        record = rebuild(&context, &instance, token);
        if let Some(record) = &record
            && let Err(error) = durable::write(&directory.record(), record)
        {
            tracing::error!(instance, %error, "the rebuilt record is not on disk");
        }
    }
    failpoint::at(Step::AdoptRead);
    let claim = claim(&context, &instance, &directory, spec.as_ref(), record.as_ref());
    let left = match record {
        None => Left::Ended(None),
        Some(record) => match processes::find(&record) {
            Found::Living(living) => {
                failpoint::at(Step::AdoptVerified);
                let run = Run { living: Arc::new(living), record };
                let ready = ready(&instance, &run).await;
                Left::Living { run, ready }
            }
            Found::Unknown(why) => Left::Unknown(why),
            Found::Other(what) => {
                tracing::info!(instance, "the recorded process has ended and its pid is another's now: {what}");
                Left::Ended(Some(run::ended(&directory, Some(&record)).await))
            }
            Found::Gone => Left::Ended(Some(run::ended(&directory, Some(&record)).await)),
        },
    };
    (claim, directory, left)
}

async fn ready(instance: &str, run: &Run) -> bool {
    let model = run.record.arguments.iter().skip_while(|word| *word != "--model").nth(1);
    let model = PathBuf::from(model.map(String::as_str).unwrap_or_default());
    match health::answers(&run.record.socket, &model).await {
        Ok(ready) => ready,
        Err(what) => {
            tracing::warn!(instance, pid = run.record.process.pid, "the adopted server gets no requests yet: {what}");
            false
        }
    }
}

/// Reads a file of an instance; a damaged one is set aside and named.
fn read<T: serde::de::DeserializeOwned>(context: &Context, instance: &str, path: &Path) -> Option<T> {
    match durable::read(path) {
        Ok(value) => Some(value),
        Err(durable::Error::Missing(_)) => None,
        Err(error) => {
            aside(context, instance, path, &error);
            None
        }
    }
}

fn aside(context: &Context, instance: &str, path: &Path, error: &durable::Error) {
    let place = if error.is_damage() { set_aside(context, instance, path) } else { None };
    let place =
        place.map_or("it could not be set aside".to_owned(), |to| format!("it was set aside as {}", to.display()));
    let message = format!("{error}; {place}");
    context.events.tell(instance, "FileDamaged", Severity::Error, message);
}

fn set_aside(context: &Context, instance: &str, path: &Path) -> Option<PathBuf> {
    let folder = context.settings.damaged_dir();
    fs::create_dir_all(&folder).ok()?;
    let name = path.file_name()?.to_string_lossy();
    let to = folder.join(format!("{instance}-{name}-{}", run::now_ms()));
    fs::rename(path, &to).ok().map(|()| to)
}

fn claim(
    context: &Context,
    instance: &str,
    directory: &Directory,
    spec: Option<&Spec>,
    record: Option<&Record>,
) -> Claim {
    let stored = match Claim::read(directory.path()) {
        Ok(claim) => Some(claim),
        Err(durable::Error::Missing(_)) => None,
        Err(error) => {
            aside(context, instance, &directory.path().join("claim"), &error);
            None
        }
    };
    // What is missing comes back with the set of claims; until then the run is known by what else is on disk.
    let tokens = [spec.map(|s| s.token), record.map(|r| r.token)].into_iter().flatten().map(super::claim::token);
    let mut claim = stored.unwrap_or_else(|| Claim {
        instance: instance.to_owned(),
        token: Default::default(),
        spec: DeploymentSpec {
            name: instance.rsplit_once('-').map_or(instance, |(name, _)| name).to_owned(),
            ..DeploymentSpec::default()
        },
        revision: 0,
        memory_bytes: 0,
        restarts: 0,
        failed: None,
        since: None,
    });
    claim.token = tokens.fold(claim.token, Ord::max);
    claim
}

/// Looks for a server whose record is lost: only a program of ours listens on the socket that belongs to this instance.
fn rebuild(context: &Context, instance: &str, token: Option<Token>) -> Option<Record> {
    let socket = context.settings.socket_of(instance);
    let name = socket.to_str()?;
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let words: Vec<String> = line.split(|&b| b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
        let listens = words.windows(2).any(|pair| pair[0] == "--host" && pair[1] == name);
        let (Ok(stat), Ok(executable)) = (identity::stat(pid), identity::executable(pid)) else { continue };
        let ours = fs::canonicalize(&context.settings.llama_server).is_ok_and(|real| real == executable);
        if !listens || !ours || stat.state == 'Z' {
            continue;
        }
        tracing::warn!(instance, pid, "the record was lost; it is rebuilt from the process that serves its socket");
        let end = words.len().saturating_sub(1);
        return Some(Record {
            format: FORMAT,
            instance: instance.to_owned(),
            token: token.unwrap_or(Token { generation: 0, revision: 0 }),
            stage: Stage::Released,
            process: Process { boot_id: context.boot_id.clone(), pid, start_ticks: stat.start_ticks, executable },
            shim: context.settings.shim.clone(),
            arguments: words.get(1..end).unwrap_or_default().to_vec(),
            socket,
            started_at_ms: 0,
        });
    }
    None
}

/// Removes the directory and the socket of an instance that has no process. False, and nothing is removed, while a shim
/// is at work there: one that an agent has left in the middle of a start would go on without a record.
#[must_use]
pub fn remove(directory: &Directory, socket: &Path) -> bool {
    let _lock = match start::lock(directory) {
        Err(Refusal::Locked(_)) => return false,
        // Where the lock can't even be opened, as where there is no directory, no shim can begin.
        locked => locked.ok(),
    };
    for removed in [fs::remove_dir_all(directory.path()), fs::remove_file(socket)] {
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(directory = %directory.path().display(), %error, "not everything could be removed");
            }
            _ => {}
        }
    }
    true
}
