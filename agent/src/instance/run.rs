//! A launch: write the spec, start a shim, hear what it says, take hold of the process. And the last words of its log.

use super::{
    arguments::{self, Place},
    claim::{Claim, stored_token},
    context::Context,
    machine::Process,
    state::{Ended, cause},
};
use crate::{
    blocking, clock,
    host::{
        cgroup, disk,
        processes::{self, Found},
    },
    lock,
    model::{self, Model},
    mutant,
};
use drover_shim::{
    durable,
    failpoint::{self, Step},
    identity::{self, Verdict},
    lease, logs,
    record::{self, Directory, Exit, LEASED_FORMAT, Record, SPEC_FORMAT, Spec},
};
use std::{
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdout, Command},
    time::timeout,
};

/// How long a shim may take until it has released its process.
const LAUNCH_DEADLINE: Duration = Duration::from_secs(15);
/// How long a look at the model or at free space may take.
const LOOK_DEADLINE: Duration = Duration::from_secs(10);
/// How long the record of an end may come after the end.
const EXIT_DEADLINE: Duration = Duration::from_secs(2);
const EXIT_POLL: Duration = Duration::from_millis(10);
/// Size of a log file, and their number.
const LOG_BYTES_MAX: u64 = 10 << 20;
const LOG_FILES_MAX: u32 = 3;
/// Said of a shim that can't read the spec of a server that ends with its lease.
const TOO_OLD: &str = " (on_lease_lost = \"stop\" needs a drover-shim of this agent's version: upgrade it)";
/// Free space below which nothing is started, in bytes.
pub const DISK_BYTES_MIN: u64 = 100 << 20;

/// Why a launch has brought no process.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failed {
    /// What went wrong, and the way out.
    pub message: String,
    /// Whether another attempt may help.
    pub retry: bool,
    /// Of a process that ran and had ended before it could be taken hold of: its id, and how it ended.
    pub ended: Option<(i32, Ended)>,
}

impl Failed {
    fn again(message: impl Into<String>) -> Self {
        Self { message: message.into(), retry: true, ended: None }
    }

    fn for_good(message: impl Into<String>) -> Self {
        Self { message: message.into(), retry: false, ended: None }
    }
}

/// A process, and its record.
#[derive(Debug)]
pub struct Run {
    /// The process.
    pub living: Arc<dyn Process>,
    /// Its record.
    pub record: Record,
}

/// Launches what a claim says; or takes hold of the recorded process, if that lives.
pub async fn launch(context: &Context, claim: &Claim, directory: &Directory) -> Result<Run, Failed> {
    match recorded(directory)? {
        Recorded::Living(run) => return Ok(run),
        // What an earlier run has started and left behind would share memory and GPUs with the next.
        Recorded::Ended(earlier) => cgroup::end(&earlier).await.map_err(Failed::again)?,
        Recorded::Nothing => {}
    }
    let no_session = || Failed::again("this node has no session now: nothing is started until it has one");
    let start_deadline_ns = context.session.start_until_ns().ok_or_else(no_session)?;
    enough_room(directory).await?;
    let settings = &context.settings;
    let model = find_model(&claim.spec.model_path, &settings.model_roots).await?;
    let socket = settings.socket_of(&claim.instance);
    let gpus: Vec<String> = settings.gpus.iter().map(|gpu| gpu.uuid.clone()).collect();
    let place = Place { model: &model.path, socket: &socket, gpus: &gpus };
    let arguments = arguments::build(&claim.spec, place, &context.known).map_err(Failed::for_good)?;
    let ends_with_lease = claim.ends_with_lease();
    if ends_with_lease {
        let times = context.leases.of(&claim.instance, &context.session).ok_or_else(no_session)?;
        tokio::task::block_in_place(|| lease::write(&directory.lease(), times))
            .map_err(|e| Failed::again(format!("{}: {e}", directory.lease().display())))?;
    }
    let spec = Spec {
        format: if ends_with_lease { LEASED_FORMAT } else { SPEC_FORMAT },
        instance: claim.instance.clone(),
        token: stored_token(claim.token),
        program: settings.llama_server.clone(),
        arguments,
        environment: arguments::environment(&gpus, directory.path(), &settings.llama_server_environment),
        socket,
        log_bytes_max: LOG_BYTES_MAX,
        log_files_max: LOG_FILES_MAX,
        start_deadline_ns,
        boot_id: context.boot_id.clone(),
        halt_file: settings.halt_file(),
        cgroup_base: context.cgroup_base.clone(),
        ends_with_lease,
    };
    tokio::task::block_in_place(|| durable::place(&directory.spec(), &spec))
        .map_err(|e| Failed::again(e.to_string()))?;
    failpoint::at(Step::StartSpecWritten);
    let owned = context.board.get(&claim.instance).is_some_and(|entry| entry.owned);
    if !owned && !mutant::on(mutant::name::START_WITHOUT_CLAIM) {
        return Err(Failed::again("no claim of this node covers it any more: it is started once it is claimed again"));
    }
    let mut shim = start_shim(&settings.shim, directory)?;
    failpoint::at(Step::StartShimForked);
    let said = timeout(LAUNCH_DEADLINE, hear(&mut shim, directory, ends_with_lease)).await;
    let outcome = match said {
        Ok(said) => said,
        Err(_) => {
            // Its end makes a held child exit; one that was released is on record and found below.
            let _ = shim.kill().await;
            Err(Failed::again(format!("the shim has not answered within {} s", LAUNCH_DEADLINE.as_secs())))
        }
    };
    failpoint::at(Step::StartHeard);
    // The shim lives as long as its server: somebody has to collect it when it ends.
    tokio::spawn(async move { shim.wait().await });
    match (recorded(directory)?, outcome) {
        (Recorded::Living(run), _) => Ok(run),
        (_, Err(failed)) => Err(failed),
        (left, Ok(())) => {
            let record = if let Recorded::Ended(record) = left { Some(record) } else { None };
            let pid = record.as_ref().map_or(0, |record| record.process.pid);
            let ended = ended(directory, record.as_ref()).await;
            Err(Failed { ended: Some((pid, ended)), ..Failed::again("llama-server has ended at once") })
        }
    }
}

async fn enough_room(directory: &Directory) -> Result<(), Failed> {
    let path = directory.path().to_owned();
    let shown = path.display().to_string();
    let free = blocking::within(LOOK_DEADLINE, &shown, move || disk::free_bytes(&path)).await;
    let free = free.map_err(|e| e.to_string()).and_then(|free| free.map_err(|e| e.to_string()));
    let free = free.map_err(|e| Failed::again(format!("free disk space of {shown}: {e}")))?;
    if free < DISK_BYTES_MIN {
        return Err(Failed::again(format!(
            "only {} MiB are free in {shown}: nothing is started below {} MiB",
            free >> 20,
            DISK_BYTES_MIN >> 20
        )));
    }
    Ok(())
}

/// Model roots may lie on another host, which may be away.
async fn find_model(model_path: &str, roots: &[PathBuf]) -> Result<Model, Failed> {
    let (path, roots) = (model_path.to_owned(), roots.to_vec());
    let looked = blocking::within(LOOK_DEADLINE, model_path, move || model::resolve(&path, &roots)).await;
    match looked {
        Ok(Ok(model)) => Ok(model),
        Ok(Err(error)) => Err(Failed::for_good(error.to_string())),
        Err(error) => {
            Err(Failed::again(format!("model_path \"{}\" can't be looked at: {error}", model_path.escape_debug())))
        }
    }
}

/// What the record of a directory says.
enum Recorded {
    /// The process lives.
    Living(Run),
    /// It has ended.
    Ended(Record),
    /// There is no record.
    Nothing,
}

fn recorded(directory: &Directory) -> Result<Recorded, Failed> {
    let record: Record = match record::read(&directory.record()) {
        Ok(record) => record,
        Err(durable::Error::Missing(_)) => return Ok(Recorded::Nothing),
        Err(error) => return Err(Failed::again(error.to_string())),
    };
    match processes::find(&record) {
        Found::Living(living) => Ok(Recorded::Living(Run { living: Arc::new(living), record })),
        Found::Gone | Found::Other(_) => Ok(Recorded::Ended(record)),
        Found::Unknown(why) => {
            Err(Failed::again(format!("it can't be told whether the recorded process still runs: {why}")))
        }
    }
}

fn start_shim(shim: &Path, directory: &Directory) -> Result<Child, Failed> {
    #[allow(clippy::disallowed_methods, reason = "this is the agent's start of the shim")]
    let mut command = Command::new(shim);
    command
        .arg(directory.path())
        .env_clear()
        .envs(failpoint::handed_on())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .current_dir("/")
        .kill_on_drop(false);
    command.spawn().map_err(|e| Failed::again(format!("shim {}: {e}", shim.display())))
}

/// Listens to a shim until its process is released, or will not be.
async fn hear(shim: &mut Child, directory: &Directory, ends_with_lease: bool) -> Result<(), Failed> {
    let Some(output) = shim.stdout.take() else { return Err(Failed::again("the shim has no output")) };
    let mut lines = BufReader::<ChildStdout>::new(output).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
        match word {
            "released" => return Ok(()),
            "failed" => return Err(Failed::for_good(format!("llama-server can't be executed: {rest}"))),
            "refused" => {
                let (code, why) = rest.split_once(' ').unwrap_or((rest, ""));
                // A lower token: somebody else was given this instance meanwhile.
                let retry = code != "11";
                let way_out = match code {
                    "10" => format!(
                        " ({}): it lets go when its server has ended; drover-agent check shows both",
                        lock::held_by(&directory.lock())
                    ),
                    "16" if ends_with_lease => TOO_OLD.to_owned(),
                    _ => String::new(),
                };
                return Err(Failed { retry, ..Failed::again(format!("the start was refused: {why}{way_out}")) });
            }
            "note" => tracing::warn!("shim: {rest}"),
            _ => {}
        }
    }
    Err(Failed::again("the shim ended before it had started anything"))
}

/// How the process of a record ended. Its shim makes that durable in a moment; without a shim it stays unknown. With a
/// record, only an end of that very process counts. What it had started ends too, also when its shim is dead.
pub async fn ended(directory: &Directory, record: Option<&Record>) -> Ended {
    let read = || {
        record::read::<Exit>(&directory.exit()).ok().filter(|exit| record.is_none_or(|r| r.process.is(&exit.process)))
    };
    let wait = async {
        loop {
            if let Some(exit) = read() {
                return exit;
            }
            tokio::time::sleep(EXIT_POLL).await;
        }
    };
    let exit = timeout(EXIT_DEADLINE, wait).await.ok();
    // Whoever says that it has ended may be wrong, as when its handle fails: its cgroup would take it along.
    if let Some(record) = record
        && matches!(identity::verify(&record.process, None), Verdict::Gone | Verdict::Other(_))
        && let Err(error) = cgroup::end(record).await
    {
        tracing::warn!(instance = record.instance, "{error}");
    }
    // A log that a signal cut off ends anywhere: only its errors tell something.
    let signalled = exit.as_ref().is_some_and(|exit| exit.signal.is_some());
    let log = last_log(&directory.log());
    let last_lines = last_words(&log, !signalled);
    match exit {
        None => Ended { last_lines, ..Ended::default() },
        Some(exit) => {
            let cause = cause::of(exit.code, &log);
            let Exit { code, signal, exec_error, oom_killed, lease_lost, .. } = exit;
            Ended { code, signal, exec_error, oom_killed, lease_lost, last_lines, cause }
        }
    }
}

/// Raises the token of a run everywhere it is kept, spec first: from then on no lower one can start anything. Where nothing
/// was started yet there is nothing to raise, and the claim need not reach the disk: after a crash of the host it is told
/// again.
pub fn raise(directory: &Directory, claim: &Claim) -> Result<(), record::Error> {
    let token = stored_token(claim.token);
    let mut is_first = true;
    match record::read::<Spec>(&directory.spec()) {
        Err(durable::Error::Missing(_)) => {}
        Ok(mut spec) if spec.token < token => {
            is_first = false;
            spec.token = token;
            durable::write(&directory.spec(), &spec)?;
            failpoint::at(Step::RaiseSpecWritten);
        }
        Ok(_) => is_first = false,
        Err(error) => return Err(error),
    }
    match record::read::<Record>(&directory.record()) {
        Err(durable::Error::Missing(_)) => {}
        Ok(mut record) if record.token < token => {
            is_first = false;
            record.token = token;
            durable::write(&directory.record(), &record)?;
            failpoint::at(Step::RaiseRecordWritten);
        }
        Ok(_) => is_first = false,
        Err(error) => return Err(error),
    }
    if is_first { claim.place(directory.path()) } else { claim.write(directory.path()) }
}

/// The end of the log, of the last run alone.
fn last_log(directory: &Path) -> String {
    const TAIL_BYTES: u64 = 16 << 10;
    let read = || -> std::io::Result<String> {
        let mut file = std::fs::File::open(logs::file(directory, 0))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    // What an earlier run has said is no word of this one's. A shim that is one version older does not mark where it began.
    match text.rsplit_once(logs::RUN_BEGINS) {
        Some((_, of_this)) => of_this.split_once('\n').map_or("", |(_, printed)| printed).to_owned(),
        None => text,
    }
}

/// The last lines of a log that tell of an error; when none does, the last line of all, if `any` will do.
fn last_words(text: &str, any: bool) -> String {
    const LINES_MAX: usize = 3;
    const LINE_CHARS_MAX: usize = 300;
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    // llama-server's lines begin with a time and a letter: "0.00.035.530 E llama_model_load: …".
    let tells_error =
        |line: &&&str| line.contains(" E ") || line.starts_with("error") || line.starts_with("drover-shim:");
    let mut chosen: Vec<&str> = lines.iter().filter(tells_error).copied().collect();
    if chosen.is_empty() && any {
        chosen.extend(lines.last());
    }
    let first = chosen.len().saturating_sub(LINES_MAX);
    let cut = |line: &&str| line.chars().take(LINE_CHARS_MAX).collect::<String>().escape_debug().to_string();
    chosen[first..].iter().map(cut).collect::<Vec<_>>().join(" | ")
}

/// Milliseconds since boot, as the state machine counts.
#[must_use]
pub fn now_ms() -> u64 {
    clock::boottime_ns() / 1_000_000
}
