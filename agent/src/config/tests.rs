//! Which configuration is in force, and how a wrong one is refused.

use super::*;

fn flags(root: &Path) -> Flags {
    Flags {
        node: Some("host-1".to_owned()),
        state_dir: Some(root.join("state")),
        llama_server: Some("/bin/sleep".into()),
        shim: Some("/bin/true".into()),
        model_roots: Some(vec![root.to_owned()]),
        ..Flags::default()
    }
}

fn with_file(root: &Path, text: &str) -> anyhow::Result<Settings> {
    let path = root.join("agent.toml");
    std::io::Write::write_all(&mut fs::File::create(&path).unwrap(), text.as_bytes()).unwrap();
    Flags { config: Some(path), ..flags(root) }.settings()
}

#[test]
fn flags_win_over_the_file_and_the_rest_has_defaults() {
    let place = tempfile::tempdir().unwrap();
    let text =
        "node = 'from-file'\nlabels = { zone = 'a' }\nmemory_bytes = 5\n[[gpus]]\nuuid = 'GPU-1'\nmemory_bytes = 9\n";
    let settings = with_file(place.path(), text).unwrap();
    assert_eq!((settings.node.as_str(), settings.memory_bytes, settings.gpus.len()), ("host-1", 5, 1));
    assert_eq!(settings.labels["zone"], "a");
    assert_eq!(settings.coordinators, ["127.0.0.1:7400"]);
    assert!(settings.runtime_dir.ends_with("state/run") && settings.runtime_dir.is_dir());
    assert_eq!(fs::metadata(&settings.state_dir).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn what_is_wrong_is_named_with_the_way_out() {
    let place = tempfile::tempdir().unwrap();
    let root = place.path();
    for (text, part) in [
        ("nodes = 1\n", "line 1"),
        ("return_within_ms = -1\n", "return_within_ms = -1: must be from 0 to 600000"),
        ("return_within_ms = 600001\n", "return_within_ms = 600001"),
        ("\nrestarts = { quick = 1 }\n", "line 2"),
        ("memory_bytes = -1\n", "memory_bytes = -1"),
        ("proxy_listen = '0.0.0.0:7410'\n", "proxy_listen"),
        ("coordinators = ['nowhere']\n", "host:port"),
        ("join_secret_file = '/none'\n", "join_secret_file"),
        ("cgroup_root = 'on'\n", "cgroup_root = on"),
        ("llama_server_environment = { LLAMA_ARG_HOST = '0.0.0.0' }\n", "LLAMA_ARG_HOST"),
    ] {
        let error = format!("{:#}", with_file(root, text).unwrap_err());
        assert!(error.contains(part), "{error}");
    }
    let wrong = |change: fn(&mut Flags)| {
        let mut flags = flags(root);
        change(&mut flags);
        format!("{:#}", flags.settings().unwrap_err())
    };
    assert!(wrong(|f| f.node = Some("Bad_Name".to_owned())).contains("Bad_Name"));
    assert!(wrong(|f| f.node = None).contains("node is not set"));
    assert!(wrong(|f| f.model_roots = Some(vec!["/none".into()])).contains("/none"));
    assert!(wrong(|f| f.model_roots = Some(vec!["/".into()])).contains("whole file system"));
    assert!(wrong(|f| f.llama_server = Some("/etc/passwd".into())).contains("no program"));
    assert!(wrong(|f| f.labels = Some(vec!["zone".to_owned()])).contains("name=value"));
    assert!(wrong(|f| f.runtime_dir = Some(PathBuf::from(format!("/tmp/{}", "x".repeat(90))))).contains("too long"));
    let _ = fs::remove_dir(format!("/tmp/{}", "x".repeat(90)));
    let script = root.join("wrapper");
    std::io::Write::write_all(&mut fs::File::create(&script).unwrap(), b"#!/bin/sh\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let error = Flags { llama_server: Some(script), ..flags(root) }.settings().unwrap_err().to_string();
    assert!(error.contains("is a script"), "{error}");
}

#[test]
fn a_socket_has_its_instance_s_name_where_that_fits() {
    let short = socket_of(Path::new("/run/drover"), "tiny-234567");
    assert_eq!(short, Path::new("/run/drover/tiny-234567.sock"));
    let deep = PathBuf::from(format!("/{}", "d".repeat(80)));
    let (one, other) = (socket_of(&deep, &"a".repeat(55)), socket_of(&deep, &"b".repeat(55)));
    assert!(one.as_os_str().len() < SOCKET_PATH_MAX && one != other);
}
