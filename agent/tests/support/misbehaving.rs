//! Stands in for llama-server in tests: it serves `/health` and `/props` on its unix socket, and misbehaves as the variable
//! `MISBEHAVE` says: `at-once` exits before it listens, `after-ready` exits after a few answers, `deaf` ignores SIGTERM,
//! `parent` starts a child in a session of its own and writes its pid to `CHILD_FILE`. With `MARK` a file is named: `loading`
//! says that it loads until that file is there, `reading` reads its model bit by bit before it listens until then,
//! `other-model` says that it serves another model until then; `says` prints what the file holds and exits with 1, and serves
//! when there is none. `stuck` does nothing at all before it listens, for ever. `fugitive` ignores SIGTERM and has a grandchild that does so too, in a session of its own, whose
//! parent has ended; `hungry` takes memory without end as soon as it is asked for its health while `CHILD_FILE` exists,
//! which it removes.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "a test")]

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Read as _, Seek as _, Write as _},
    os::unix::net::UnixListener,
    path::PathBuf,
    process::{Command, ExitCode},
    thread,
    time::Duration,
};

/// Answers of `/health` after which `after-ready` ends: the first makes it ready.
const ANSWERS: u32 = 3;

fn eat() -> ! {
    let mut all = Vec::new();
    loop {
        all.push(vec![1_u8; 4 << 20]);
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().collect();
    if arguments.iter().any(|word| word == "--help") {
        println!("--host HOST\n--metrics\n--model FNAME");
        return ExitCode::SUCCESS;
    }
    let value = |flag: &str| arguments.iter().skip_while(|word| *word != flag).nth(1).expect("a value").clone();
    let how = env::var("MISBEHAVE").unwrap_or_default();
    println!("misbehaves: {how}");
    let mark = PathBuf::from(env::var("MARK").unwrap_or_default());
    let marked = || mark.exists();
    match how.as_str() {
        "at-once" => return ExitCode::from(3),
        "says" => {
            if let Ok(words) = fs::read_to_string(&mark) {
                println!("{words}");
                return ExitCode::FAILURE;
            }
        }
        "reading" => {
            let mut model = fs::File::open(value("--model")).unwrap();
            while !marked() {
                let mut some = [0; 64];
                if model.read(&mut some).unwrap() == 0 {
                    model.rewind().unwrap();
                }
                thread::sleep(Duration::from_millis(100));
            }
        }
        "stuck" => loop {
            thread::park();
        },
        "deaf" => drover_shim::sys::ignore_signals(),
        #[allow(clippy::zombie_processes, reason = "that it is left behind is the misbehaviour")]
        "parent" => {
            let child = Command::new("setsid").args(["sleep", "600"]).spawn().unwrap();
            fs::write(env::var("CHILD_FILE").unwrap(), child.id().to_string()).unwrap();
        }
        "fugitive" => {
            drover_shim::sys::ignore_signals();
            let forks = "setsid sh -c 'sleep 600 & echo $! > $CHILD_FILE.new; mv $CHILD_FILE.new $CHILD_FILE'";
            Command::new("sh").args(["-c", forks]).status().unwrap();
        }
        _ => {}
    }
    let listener = UnixListener::bind(value("--host")).unwrap();
    let mut answers = 0;
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
        let first = lines.next().unwrap_or_default();
        while lines.next().is_some_and(|line| !line.is_empty()) {}
        let mut status = "200 OK";
        let body = if first.contains("/props") {
            let model = if how == "other-model" && !marked() { "/elsewhere.gguf".to_owned() } else { value("--model") };
            format!("{{\"model_path\": \"{model}\"}}")
        } else {
            if how == "loading" && !marked() {
                status = "503 Service Unavailable";
            }
            "{\"status\": \"ok\"}".to_owned()
        };
        let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
        // Who asked may be gone.
        let _ = stream.write_all(format!("{head}{body}").as_bytes());
        answers += u32::from(first.contains("/health"));
        if how == "hungry" && first.contains("/health") && fs::remove_file(env::var("CHILD_FILE").unwrap()).is_ok() {
            eat();
        }
        if how == "after-ready" && answers >= ANSWERS {
            return ExitCode::from(4);
        }
    }
    ExitCode::SUCCESS
}
