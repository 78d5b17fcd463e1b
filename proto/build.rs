//! Compiles the contract with protox, so that no `protoc` is needed for it, and keeps the descriptors for reflection
//! and for the JSON and TOML forms of messages.

use prost::Message as _;
use std::{env, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "drover/v1/types.proto",
        "drover/v1/processes.proto",
        "drover/v1/fleet.proto",
        "drover/v1/node.proto",
        "drover/store/v1/records.proto",
    ];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(files)?;
    let set = compiler.file_descriptor_set();
    let out = PathBuf::from(env::var("OUT_DIR")?);
    #[allow(clippy::disallowed_methods, reason = "a build script's output is made anew after a crash")]
    fs::write(out.join("drover.bin"), set.encode_to_vec())?;
    tonic_prost_build::configure().build_transport(false).compile_fds(set)?;
    Ok(())
}
