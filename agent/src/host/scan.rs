//! The llama-server processes of the host, as /proc shows them, whoever started them.
//!
//! What can't be read is said, never guessed. Must never: say to whom a process belongs.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Name of llama.cpp's server.
const PROGRAM: &str = "llama-server";
/// Name of the program that keeps a server.
const SHIM: &str = "drover-shim";
/// Most characters of a command line that is shown.
const COMMAND_LINE_MAX: usize = 1024;
/// What stands for a secret.
const MASK: &str = "***";
/// Options whose value is a secret. The files of such values are none.
const SECRETS: [&str; 5] = ["--api-key", "--hf-token", "-hft", "--token", "--password"];

/// A llama-server process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Process id.
    pub pid: i32,
    /// Start time, in clock ticks since boot.
    pub start_ticks: u64,
    /// Its executable; `None` when it can't be read.
    pub executable: Option<PathBuf>,
    /// Its arguments, the program's name first, as they are: secrets stand in them. Empty when they can't be read.
    pub arguments: Vec<String>,
    /// Memory in use (resident set), in bytes; 0 when it can't be read.
    pub rss_bytes: i64,
    /// Whether its parent is a shim.
    pub kept_by_shim: bool,
    /// What can't be read of it, and why.
    pub unreadable: Option<String>,
}

impl Seen {
    /// The command line for people: values of secrets masked, bounded.
    #[must_use]
    pub fn command_line(&self) -> String {
        masked(&self.arguments).join(" ").chars().take(COMMAND_LINE_MAX).collect()
    }

    /// The model file that its command line names.
    #[must_use]
    pub fn model_path(&self) -> Option<&str> {
        value_of(&self.arguments, &["--model", "-m"])
    }

    /// Name of its model for clients, as its command line says.
    #[must_use]
    pub fn alias(&self) -> Option<&str> {
        value_of(&self.arguments, &["--alias", "-a"])
    }

    /// What it listens on.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        value_of(&self.arguments, &["--host"])
    }
}

/// All llama-servers below `proc` ("/proc"): by the executable, which is `server` or bears llama-server's name; where
/// that can't be read, by the name that the kernel shows.
///
/// # Errors
/// When `proc` itself can't be listed.
pub fn llama_servers(proc: &Path, server: &Path) -> io::Result<Vec<Seen>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(proc)? {
        // One that is gone meanwhile is no error.
        let Some(pid) = entry.ok().and_then(|e| e.file_name().to_str()?.parse::<i32>().ok()) else { continue };
        all.extend(look(proc, pid, server));
    }
    all.sort_by_key(|seen| seen.pid);
    Ok(all)
}

fn look(proc: &Path, pid: i32, server: &Path) -> Option<Seen> {
    let place = proc.join(pid.to_string());
    let executable = link(&place.join("exe"));
    // Most processes are told apart here, at the price of one call.
    if let Ok(path) = &executable
        && path != server
        && path.file_name().is_none_or(|name| name != PROGRAM)
    {
        return None;
    }
    let stat = Stat::read(&place)?;
    if executable.is_err() && stat.name != PROGRAM || matches!(stat.state, 'Z' | 'X') {
        return None;
    }
    let command_line = fs::read(place.join("cmdline"));
    let mut unreadable = Vec::new();
    if let Err(error) = &executable {
        unreadable.push(format!("its executable can't be read: {error}"));
    }
    if let Err(error) = &command_line {
        unreadable.push(format!("its command line can't be read: {error}"));
    }
    Some(Seen {
        pid,
        start_ticks: stat.start_ticks,
        executable: executable.ok(),
        arguments: words(&command_line.unwrap_or_default()),
        rss_bytes: rss_bytes(&place).unwrap_or(0),
        kept_by_shim: is_shim(proc, stat.parent),
        unreadable: (!unreadable.is_empty()).then(|| unreadable.join("; ")),
    })
}

/// The executable; of one whose file was replaced, the path that it was started from.
fn link(exe: &Path) -> io::Result<PathBuf> {
    let path = fs::read_link(exe)?;
    Ok(path.to_string_lossy().strip_suffix(" (deleted)").map_or_else(|| path.clone(), PathBuf::from))
}

fn is_shim(proc: &Path, pid: i32) -> bool {
    let place = proc.join(pid.to_string());
    match link(&place.join("exe")) {
        Ok(path) => path.file_name().is_some_and(|name| name == SHIM),
        Err(_) => Stat::read(&place).is_some_and(|stat| stat.name == SHIM),
    }
}

struct Stat {
    name: String,
    state: char,
    parent: i32,
    start_ticks: u64,
}

impl Stat {
    /// `None` when it can't be read: the process is gone, or nothing at all is known of it.
    fn read(place: &Path) -> Option<Self> {
        let text = fs::read_to_string(place.join("stat")).ok()?;
        // The name stands in parentheses and may hold spaces and parentheses itself.
        let (head, rest) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        Some(Self {
            name: head.split_once('(')?.1.to_owned(),
            state: fields.first()?.chars().next()?,
            parent: fields.get(4 - 3)?.parse().ok()?,
            start_ticks: fields.get(22 - 3)?.parse().ok()?,
        })
    }
}

fn rss_bytes(place: &Path) -> Option<i64> {
    let pages: i64 = fs::read_to_string(place.join("statm")).ok()?.split(' ').nth(1)?.trim().parse().ok()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(4096);
    #[allow(clippy::useless_conversion, reason = "c_long differs between platforms")]
    Some(pages.saturating_mul(i64::from(page)))
}

fn words(command_line: &[u8]) -> Vec<String> {
    let text = command_line.strip_suffix(&[0]).unwrap_or(command_line);
    if text.is_empty() {
        return Vec::new();
    }
    text.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

fn masked(arguments: &[String]) -> Vec<String> {
    let mut hide = false;
    let mask = |word: &String| {
        if std::mem::replace(&mut hide, SECRETS.contains(&word.as_str())) {
            return MASK.to_owned();
        }
        match word.split_once('=') {
            Some((option, _)) if SECRETS.contains(&option) => format!("{option}={MASK}"),
            _ => word.clone(),
        }
    };
    arguments.iter().map(mask).collect()
}

fn value_of<'a>(arguments: &'a [String], options: &[&str]) -> Option<&'a str> {
    // llama-server goes by the last one.
    arguments.windows(2).rev().find(|pair| options.contains(&pair[0].as_str())).map(|pair| pair[1].as_str())
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "makes up a /proc, which no crash outlives")]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A process of a made-up /proc; without an executable one whose link can't be read.
    fn process(proc: &Path, pid: i32, parent: i32, executable: Option<&str>, name: &str, arguments: &[&str]) {
        let place = proc.join(pid.to_string());
        fs::create_dir(&place).unwrap();
        if let Some(executable) = executable {
            symlink(executable, place.join("exe")).unwrap();
        }
        let stat = format!("{pid} ({name}) S {parent} 1 1 0 -1 0 0 0 0 0 7 8 0 0 20 0 1 0 42{pid} 0 0");
        fs::write(place.join("stat"), stat).unwrap();
        fs::write(place.join("statm"), "100 25 3 1 0 9 0\n").unwrap();
        fs::write(place.join("cmdline"), arguments.iter().map(|word| format!("{word}\0")).collect::<String>()).unwrap();
    }

    #[test]
    fn servers_are_known_by_their_executable_and_what_is_unreadable_is_said() {
        let proc = tempfile::tempdir().unwrap();
        let proc = proc.path();
        process(proc, 10, 1, Some("/opt/drover-shim"), "drover-shim", &[]);
        process(proc, 11, 10, Some("/opt/llama-server"), "llama-server", &["llama-server", "-m", "/m/a.gguf"]);
        process(proc, 12, 1, Some("/opt/llama-server (deleted)"), "odd) name", &["x"]);
        process(proc, 13, 1, Some("/bin/bash"), "llama-server", &["llama-server"]);
        process(proc, 14, 1, None, "llama-server", &["llama-server"]);
        process(proc, 15, 1, Some("/opt/patched"), "patched", &[]);
        process(proc, 16, 1, None, "bash", &["bash"]);
        fs::create_dir(proc.join("17")).unwrap();
        fs::create_dir(proc.join("sys")).unwrap();

        let seen = llama_servers(proc, Path::new("/opt/patched")).unwrap();
        assert_eq!(seen.iter().map(|s| s.pid).collect::<Vec<_>>(), [11, 12, 14, 15]);
        assert!(seen[0].kept_by_shim && !seen[1].kept_by_shim);
        assert_eq!((seen[0].model_path(), seen[0].start_ticks), (Some("/m/a.gguf"), 4211));
        assert!(seen[0].rss_bytes >= 25 * 4096 && seen[0].unreadable.is_none());
        assert_eq!(seen[1].executable.as_deref(), Some(Path::new("/opt/llama-server")));
        let why = seen[2].unreadable.as_deref().unwrap();
        assert!(why.contains("executable") && seen[2].executable.is_none(), "{why}");
        assert_eq!(seen[3].arguments, Vec::<String>::new());
    }

    #[test]
    fn secrets_are_masked_and_what_is_shown_is_bounded() {
        let words = ["llama-server", "--api-key", "canary", "--hf-token=canary", "--api-key-file", "/f", "--host", "h"];
        let mut seen = Seen {
            pid: 1,
            start_ticks: 1,
            executable: None,
            arguments: words.map(str::to_owned).to_vec(),
            rss_bytes: 0,
            kept_by_shim: false,
            unreadable: None,
        };
        let shown = seen.command_line();
        assert_eq!(shown, "llama-server --api-key *** --hf-token=*** --api-key-file /f --host h");
        assert_eq!(seen.host(), Some("h"));
        seen.arguments.push("é".repeat(5000));
        assert_eq!(seen.command_line().chars().count(), COMMAND_LINE_MAX);
    }
}
