//! What earlier agents left: living servers are taken back, ended ones settled, damaged files set aside and named.
//!
//! Losing contact is not losing the process: nothing found here is ended. A process is taken back only when its whole
//! identity matches its record.

use super::{
    claim::{self, Claim},
    context::Context,
    health,
    run::{self, Run},
    state::Ended,
    traces::{self, Traces},
};
use crate::host::{
    cgroup,
    processes::{self, Found},
};
use drover_proto::{ids, v1::Severity};
use drover_shim::{
    Refusal,
    cgroup::Cgroup,
    durable,
    failpoint::{self, Step},
    identity,
    record::{self, Directory, Record, Spec},
    start,
};
use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::{
    net::UnixStream,
    task::block_in_place,
    time::{Duration, Instant, sleep},
};

/// Most files that are kept of those that were found damaged.
pub const SET_ASIDE_MAX: usize = 100;

/// How long a shim is waited for that may be about to let go of its lock, and how often it is looked at.
const SHIM_PATIENCE: Duration = Duration::from_millis(300);
const SHIM_POLL: Duration = Duration::from_millis(5);

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
    Unknown(Unsure),
}

/// What is known of a run whose process can't be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsure {
    /// Why it can't be told.
    pub why: String,
    /// The recorded process; 0 when no record can be read.
    pub pid: i32,
    /// Whether a server answers at the instance's socket, for the model that was recorded: then it goes on serving.
    pub answers: bool,
    /// Whether a shim that an earlier agent has started is at work: something is about to run, or never will.
    pub starting: bool,
}

impl Unsure {
    /// Of one that nothing but this is known of.
    #[must_use]
    pub fn because(why: impl Into<String>) -> Self {
        Self { why: why.into(), pid: 0, answers: false, starting: false }
    }
}

/// The claims and runs that earlier agents left.
pub async fn scan(context: &Arc<Context>) -> io::Result<Vec<(Claim, Directory, Left)>> {
    collect_leftovers(&context.settings.state_dir);
    let mut names = Vec::new();
    for entry in fs::read_dir(context.settings.instances_dir())? {
        match entry?.file_name().into_string() {
            Ok(name) if ids::check_instance_id(&name).is_ok() => names.push(name),
            other => tracing::warn!(?other, "the folder of instances has an entry that is none of ours"),
        }
    }
    names.sort();
    for name in &names {
        collect_leftovers(&context.settings.instances_dir().join(name));
    }
    // Each look waits for an answer of a server at most as long as a probe may take: all at the same time.
    let looks = names.into_iter().map(|name| look(context.clone(), name));
    let found = futures::future::join_all(looks).await;
    if let Some(base) = &context.cgroup_base {
        let records = found.iter().filter_map(|(_, directory, _)| record::read::<Record>(&directory.record()).ok());
        let recorded: Vec<Cgroup> = records.filter_map(|record| record.cgroup).collect();
        for (path, pids) in cgroup::tidy(base, &recorded) {
            let message =
                format!("no record names the cgroup {}: its processes {pids:?} are left alone", path.display());
            context.events.tell("", "UnnamedCgroup", Severity::Warning, message);
        }
    }
    Ok(found)
}

/// Removes what writers that were killed in the middle of a write have left in a directory.
fn collect_leftovers(directory: &Path) {
    for leftover in durable::leftovers(directory).unwrap_or_default() {
        if is_writing(leftover.writer) {
            continue;
        }
        match fs::remove_file(&leftover.path) {
            Ok(()) => {
                tracing::info!(path = %leftover.path.display(), "the rest of a write that was cut off is removed")
            }
            Err(error) => tracing::warn!(path = %leftover.path.display(), %error, "it can't be removed"),
        }
    }
}

/// Whether the writer of a temporary file may be at work still. This program writes nothing before it has looked at what
/// others left, so one with its pid was another's.
#[must_use]
pub fn is_writing(writer: i32) -> bool {
    writer.cast_unsigned() != std::process::id()
        && !identity::stat(writer).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Looks at one instance.
pub async fn look(context: Arc<Context>, instance: String) -> (Claim, Directory, Left) {
    let settings = &context.settings;
    let traces = Traces::read(&settings.instances_dir(), &instance);
    for (path, error) in traces.unusable() {
        if !matches!(error, durable::Error::Newer { .. }) {
            aside(&context, &instance, &path, error);
        }
    }
    let directory = traces.directory.clone();
    let socket = settings.socket_of(&instance);
    // Nothing is concluded from what can't be read, nor written over it.
    let unread = traces.unread().map(ToString::to_string);
    let record = traces.record.as_ref().ok().cloned().or_else(|| {
        let record = traces.rebuilt(&socket, &settings.llama_server, &settings.shim).filter(|_| unread.is_none())?;
        let pid = record.process.pid;
        let cgroup = context.cgroup_base.as_deref().and_then(|base| Cgroup::of(pid, base, &instance));
        let record = Record { cgroup, ..record };
        tracing::warn!(instance, pid, "the record was lost; it is rebuilt from the process that serves its socket");
        if let Err(error) = durable::write(&directory.record(), &record) {
            tracing::error!(instance, %error, "the rebuilt record is not on disk");
        }
        Some(record)
    });
    let known = record.clone();
    failpoint::at(Step::AdoptRead);
    let mut claim = traces.claim(record.as_ref());
    let left = match (unread, record) {
        (Some(why), record) => {
            let specified = traces.spec.ok().map(|spec| spec.arguments);
            let arguments = record.map(|record| record.arguments).or(specified).unwrap_or_default();
            let answers = serves(&instance, &socket, &arguments).await;
            Left::Unknown(Unsure { answers, ..Unsure::because(why) })
        }
        (None, None) if is_listening(&socket).await => {
            Left::Unknown(Unsure::because("it has no record, and somebody listens on its socket"))
        }
        (None, None) => Left::Ended(None),
        (None, Some(record)) => match processes::find(&record) {
            Found::Living(living) => {
                failpoint::at(Step::AdoptVerified);
                let record = finish_raise(&directory, traces.spec.as_ref().ok(), &mut claim, record);
                let ready = serves(&instance, &record.socket, &record.arguments).await;
                Left::Living { run: Run { living: Arc::new(living), record }, ready }
            }
            Found::Unknown(why) => {
                let answers = serves(&instance, &record.socket, &record.arguments).await;
                Left::Unknown(Unsure { pid: record.process.pid, answers, ..Unsure::because(why) })
            }
            Found::Other(what) => {
                tracing::info!(instance, "the recorded process has ended and its pid is another's: {what}");
                Left::Ended(Some(run::ended(&directory, Some(&record)).await))
            }
            Found::Gone => Left::Ended(Some(run::ended(&directory, Some(&record)).await)),
        },
    };
    let left = match left {
        Left::Ended(ended) => match no_start_under_way(&directory, known.as_ref()).await {
            Ok(()) => Left::Ended(ended),
            Err(why) => Left::Unknown(Unsure { starting: true, ..Unsure::because(why) }),
        },
        other => other,
    };
    (claim, directory, left)
}

/// That no start which an earlier agent has begun can bring a process any more, after nothing was found to live. Its shim may
/// be at work, and holds the lock then: what comes of it is seen later. Or it has not even looked yet: it does so under the
/// lock, and finds that its time is over. `known` is the record by which nothing lives.
async fn no_start_under_way(directory: &Directory, known: Option<&Record>) -> Result<(), String> {
    let begun = Instant::now();
    let _lock = loop {
        match start::lock(directory) {
            // One whose server has ended lets go in a moment.
            Err(Refusal::Locked(_)) if begun.elapsed() < SHIM_PATIENCE => sleep(SHIM_POLL).await,
            Err(Refusal::Locked(_)) => return Err("a shim that an earlier agent has started is at work".to_owned()),
            // Where the lock can't even be opened, as where there is no directory, no shim can begin.
            locked => break locked.ok(),
        }
    };
    // One that was at work until now, and is dead, may have left a server.
    if let Ok(record) = record::read::<Record>(&directory.record())
        && known.is_none_or(|known| known.process != record.process)
    {
        return Err("it was started while it was looked at".to_owned());
    }
    if let Ok(spec) = record::read::<Spec>(&directory.spec())
        && spec.start_deadline_ns > 0
        && let Err(error) = block_in_place(|| durable::place(&directory.spec(), &Spec { start_deadline_ns: 0, ..spec }))
    {
        tracing::warn!(directory = %directory.path().display(), %error, "a start of an earlier agent can't be called off");
    }
    Ok(())
}

/// Finishes a raise of the token that an agent's end has cut off between two files, before anything is reported of the run:
/// its end is to bear the token too that it is known by. Where that fails, the run is known by the token of its record, so
/// that its claim raises it.
fn finish_raise(directory: &Directory, spec: Option<&Spec>, claim: &mut Claim, record: Record) -> Record {
    let token = claim::stored_token(claim.token);
    if record.token == token && spec.is_none_or(|spec| spec.token == token) {
        return record;
    }
    match block_in_place(|| run::raise(directory, claim)) {
        Ok(()) => {
            tracing::info!(instance = claim.instance, %token, "a raise of the token that was cut off is finished");
            Record { token, ..record }
        }
        Err(error) => {
            tracing::error!(instance = claim.instance, %error, "a raise of the token to {token} can't be finished");
            claim.token = claim::token(record.token);
            record
        }
    }
}

/// Whether a server answers at a socket, for the model that it was started with.
async fn serves(instance: &str, socket: &Path, arguments: &[String]) -> bool {
    match health::answers(socket, &traces::model(arguments)).await {
        Ok(ready) => ready,
        Err(what) => {
            tracing::warn!(instance, "a server that was found gets no requests yet: {what}");
            false
        }
    }
}

/// Whether somebody listens there, be it that he is too busy to take a connection.
async fn is_listening(socket: &Path) -> bool {
    let absent = |e: &io::Error| matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
    match tokio::time::timeout(health::PROBE_DEADLINE, UnixStream::connect(socket)).await {
        Ok(Err(error)) => !absent(&error),
        Ok(Ok(_)) | Err(_) => true,
    }
}

/// Sets a file that can't be used aside, if its content is at fault, and names it.
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
    fs::rename(path, &to).ok()?;
    keep_newest(&folder, SET_ASIDE_MAX);
    Some(to)
}

/// Removes the files of a folder that were put there first, but for so many.
fn keep_newest(folder: &Path, most: usize) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    // A renaming is the last change of a file's inode.
    let changed = |path: &Path| fs::symlink_metadata(path).map(|file| (file.ctime(), file.ctime_nsec()));
    let mut all: Vec<_> = entries.filter_map(|entry| Some((changed(&entry.path()).ok()?, entry.path()))).collect();
    all.sort();
    for (_, path) in all.iter().take(all.len().saturating_sub(most)) {
        if let Err(error) = fs::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "a file that was set aside long ago can't be removed");
        }
    }
}

/// Removes the directory and the socket of an instance that has no process. False, and nothing is removed, while a shim
/// is at work there: one that an agent has left in the middle of a start would go on without a record; and while its
/// server, or something that this has started, lives.
#[must_use]
pub fn remove(directory: &Directory, socket: &Path) -> bool {
    let _lock = match start::lock(directory) {
        Err(Refusal::Locked(_)) => return false,
        // Where the lock can't even be opened, as where there is no directory, no shim can begin.
        locked => locked.ok(),
    };
    if let Ok(record) = record::read::<Record>(&directory.record()) {
        let ended = matches!(processes::find(&record), Found::Gone | Found::Other(_));
        if !ended || !cgroup::is_ended(&record) {
            return false;
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_files_set_aside_the_newest_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        for n in 0..5 {
            let path = folder.path().join(format!("{}", 9 - n));
            fs::File::create(&path).unwrap();
            // The kernel's clock for files ticks every few milliseconds: what is changed last is told apart.
            let before = fs::metadata(&path).unwrap();
            while fs::metadata(&path)
                .is_ok_and(|now| (now.ctime(), now.ctime_nsec()) == (before.ctime(), before.ctime_nsec()))
            {
                fs::set_permissions(&path, before.permissions()).unwrap();
            }
        }
        keep_newest(folder.path(), 2);
        let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["5", "6"]);
    }
}
