//! The first deployment of `drover dev`: its model, its start, and one completion to show that it answers.

use super::{cluster::Addresses, config};
use crate::{
    arguments::Dev,
    client::Client,
    commands::{Context, chat, fetch, get},
    failure::Failure,
    gateway::Gateway,
    progress::Progress,
    tiny_model,
    trace::Trace,
    wait,
};
use drover_proto::v1::{ApplyDeploymentRequest, DeploymentSpec};
use serde_json::json;
use std::{
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::Instant;

/// Seed of the generated model: everybody's talks the same noise.
const SEED: u64 = 7;
/// How soon after "ready" the gateway must know the model.
const ROUTE_TIMEOUT: Duration = Duration::from_secs(10);
const INTERVAL: Duration = Duration::from_millis(50);
/// Longest wait for a piece of the answer.
const IDLE: Duration = Duration::from_secs(120);
/// Length of the answer that is shown.
const TOKENS: u32 = 48;
/// A server is stopped soon when the fleet ends: nobody else uses it.
const STOP_MS: i64 = 3000;

/// The model to serve.
#[derive(Debug)]
pub struct Model {
    /// Name of the deployment.
    pub name: String,
    /// Folder that agents may open models in.
    pub root: PathBuf,
    path: PathBuf,
    generated: bool,
}

/// The file given, checked before anything runs; without one, a model that is still to be generated.
pub fn check_model(given: Option<&Path>) -> Result<Model, Failure> {
    let Some(given) = given else {
        let (root, path) = (PathBuf::new(), PathBuf::new());
        return Ok(Model { name: "tiny".to_owned(), root, path, generated: true });
    };
    let refuse = |what: &str| Failure::Input(format!("--model {}: {what}", given.display()));
    let path = given.canonicalize().map_err(|e| refuse(&e.to_string()))?;
    let mut magic = [0; 4];
    let read = std::fs::File::open(&path).and_then(|mut file| file.read_exact(&mut magic));
    match read {
        Ok(()) if &magic == b"GGUF" => {}
        Err(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => return Err(refuse(&e.to_string())),
        _ => return Err(refuse("is no GGUF file (it does not begin with \"GGUF\")")),
    }
    let root = path.parent().unwrap_or(Path::new("/")).to_owned();
    let name = config::deployment_name(&given.file_stem().unwrap_or_default().to_string_lossy());
    Ok(Model { name, root, path, generated: false })
}

impl Model {
    /// Generates the model into `folder` when none was given.
    pub fn put(mut self, folder: &Path) -> Result<Self, Failure> {
        if self.generated {
            self.path = folder.join("tiny.gguf");
            folder.clone_into(&mut self.root);
            tiny_model::write(&self.path, SEED)
                .map_err(|e| Failure::Answered(format!("{}: {e}", self.path.display())))?;
        }
        Ok(self)
    }

    fn spec(&self, replicas: i32) -> DeploymentSpec {
        DeploymentSpec {
            name: self.name.clone(),
            model_path: self.path.display().to_string(),
            replicas: Some(replicas),
            // For a model this small more threads are slower.
            threads: self.generated.then_some(1),
            drain_timeout_ms: Some(STOP_MS),
            stop_grace_ms: Some(STOP_MS),
            ..DeploymentSpec::default()
        }
    }
}

/// Applies the first deployment and waits until it is ready.
pub async fn deploy(client: &Client, model: &Model, options: &Dev, progress: &Progress) -> Result<(), Failure> {
    progress.doing(&format!("{}: applying", model.name));
    let generation = fetch::deployment(client, &model.name).await?.map_or(0, |d| d.generation);
    let trace = Trace::begin();
    let request = ApplyDeploymentRequest { spec: Some(model.spec(options.replicas)), generation };
    let answer = client
        .write(|mut fleet| {
            let request = trace.request(request.clone());
            async move { fleet.apply_deployment(request).await }
        })
        .await?;
    let applied = answer.deployment.ok_or_else(|| fetch::empty("ApplyDeployment"))?;
    let limit = Duration::from_secs(options.timeout);
    let ready = wait::until_ready(client, &model.name, applied.generation, limit, progress).await?;
    progress.done(&format!("{}: {} of {} ready", model.name, ready.ready_replicas, ready.replicas));
    Ok(())
}

/// `--once`: one streamed completion through the gateway, and the tables of nodes and instances.
pub async fn try_out(context: &Context, client: &Client, addresses: &Addresses, name: &str) -> Result<(), Failure> {
    let gateway = Gateway::new(&addresses.http, &context.security()?)?;
    until_routed(&gateway, name).await?;
    let request = json!({
        "model": name,
        "messages": [{ "role": "user", "content": "Say hello." }],
        "stream": true,
        "max_tokens": TOKENS,
        "temperature": 0,
    });
    let (output, people) = (&context.output, !context.output.is_json());
    if people {
        output.line(&format!("POST http://{}/v1/chat/completions, streamed:", addresses.http))?;
    }
    chat::stream(output, &gateway, &request, IDLE).await?;
    if people {
        output.line("")?;
    }
    get::show_nodes(output, &fetch::nodes(client).await?)?;
    if people {
        output.line("")?;
    }
    get::show_instances(output, &fetch::instances(client, name, "").await?)
}

/// A gateway learns from a watch that an instance is ready: a moment after the API says so.
async fn until_routed(gateway: &Gateway, name: &str) -> Result<(), Failure> {
    let deadline = Instant::now() + ROUTE_TIMEOUT;
    loop {
        let (status, body) = gateway.get("/v1/models", ROUTE_TIMEOUT).await?;
        let models: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        let ids = models["data"].as_array().into_iter().flatten();
        if status.is_success() && ids.into_iter().any(|model| model["id"] == name) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let seconds = ROUTE_TIMEOUT.as_secs();
            return Err(Failure::Answered(format!("the gateway did not list model {name} within {seconds} s")));
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_model_is_refused_before_anything_runs() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("My-Model.gguf");
        let refused = || check_model(Some(&file)).unwrap_err().message().unwrap().to_owned();
        assert!(refused().contains("My-Model.gguf: No such file"), "{}", refused());
        std::fs::File::create(&file).unwrap();
        assert!(refused().contains("no GGUF file"), "{}", refused());
        tiny_model::write(&file, 1).unwrap();
        let model = check_model(Some(&file)).unwrap().put(Path::new("/nowhere")).unwrap();
        assert_eq!(model.name, "my-model");
        assert_eq!(model.spec(3).model_path, file.canonicalize().unwrap().display().to_string());
        assert!(check_model(Some(dir.path())).is_err());
    }
}
