//! Load through a gateway: streams and short requests without pause, each answer compared with what it must say.

use crate::{
    cluster::{Cluster, SOON},
    gateway::Gateway,
    programs::eventually,
};
use anyhow::ensure;
use drover_proto::v1::Instance;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{task::JoinSet, time::sleep};

/// Longest text of a stream, in tokens: long enough to be hit in the middle.
const STREAM_TOKENS: u32 = 600;
const REQUEST_TOKENS: u32 = 8;
/// How the failure of a stream that never began ends.
const REFUSED: [&str; 3] = ["502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout"];

/// What became of it all.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Streams that ended whole and said what they must.
    pub streams: usize,
    /// Short requests that were answered with what they must say.
    pub requests: usize,
    /// What failed and said so: an event with an error in a stream, or a status with a code.
    pub told: Vec<String>,
    /// What ended otherwise: cut without a word, or with another text.
    pub wrong: Vec<String>,
}

/// Load that goes on until it is ended.
#[derive(Debug)]
pub struct Load {
    tasks: JoinSet<()>,
    stop: Arc<AtomicBool>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    tally: Mutex<Tally>,
    streaming: AtomicUsize,
}

fn request(model: &str, tokens: u32, stream: bool) -> Value {
    json!({
        "model": model, "stream": stream, "max_tokens": tokens, "temperature": 0, "seed": 1,
        "messages": [{ "role": "user", "content": "Tell a story." }],
    })
}

/// One short request; its text.
///
/// # Errors
/// When it fails; with the code that it carries.
pub async fn ask(gateway: &Gateway, model: &str) -> anyhow::Result<String> {
    let (status, answer) = gateway.post("/v1/chat/completions", &request(model, REQUEST_TOKENS, false)).await?;
    ensure!(status == 200 && answer["error"].is_null(), "the answer carries an error: {status} {}", answer["error"]);
    Ok(answer["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned())
}

/// Deploys "tiny" and "other", a server each, which say different things.
///
/// # Errors
/// When one does not become ready.
pub async fn two_models(cluster: &Cluster) -> anyhow::Result<Vec<Instance>> {
    drover::tiny_model::write(&cluster.folder().join("models/other.gguf"), 2)?;
    let mut other = cluster.spec("other", 1);
    other.model_path = "other.gguf".to_owned();
    // Refused until the node has looked at its models again.
    let other = eventually("other is deployed", SOON, async || cluster.deploy(other.clone()).await).await?;
    Ok([cluster.deploy(cluster.spec("tiny", 1)).await?, other].concat())
}

impl Load {
    /// Learns what each model says, then begins: so many streams and requests of each at the same time.
    ///
    /// # Errors
    /// When a model can't be asked, or two say the same.
    pub async fn start(address: &str, models: &[&str], streams: usize, requests: usize) -> anyhow::Result<Self> {
        Self::paced(address, models, streams, requests, Duration::ZERO).await
    }

    /// As [`Load::start`], with a pause after each of them: for long runs, which are about something else than load.
    ///
    /// # Errors
    /// As [`Load::start`].
    pub async fn paced(
        address: &str,
        models: &[&str],
        streams: usize,
        requests: usize,
        pause: Duration,
    ) -> anyhow::Result<Self> {
        let gateway = Gateway::new(address);
        let mut said = BTreeMap::new();
        for model in models {
            let long = gateway.stream_chat(&request(model, STREAM_TOKENS, true), |_| {}).await?;
            said.insert((*model).to_owned(), (long, ask(&gateway, model).await?));
        }
        let texts: std::collections::BTreeSet<_> = said.values().map(|(long, _)| long).collect();
        ensure!(texts.len() == models.len(), "two models say the same: {said:?}");
        let mut load = Self { tasks: JoinSet::new(), stop: Arc::default(), shared: Arc::default() };
        for (model, (long, short)) in said {
            for _ in 0..streams {
                load.tasks.spawn(stream(
                    gateway.clone(),
                    model.clone(),
                    long.clone(),
                    load.stop.clone(),
                    load.shared.clone(),
                    pause,
                ));
            }
            for _ in 0..requests {
                // Each with connections of its own, as from many clients.
                let gateway = Gateway::new(address);
                load.tasks.spawn(short_ones(
                    gateway,
                    model.clone(),
                    short.clone(),
                    load.stop.clone(),
                    load.shared.clone(),
                    pause,
                ));
            }
        }
        Ok(load)
    }

    /// Streams that have begun and not ended.
    #[must_use]
    pub fn streaming(&self) -> usize {
        self.shared.streaming.load(Ordering::Relaxed)
    }

    /// What has become of it so far.
    #[must_use]
    pub fn tally(&self) -> Tally {
        self.shared.tally.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends it: what is under way comes to its own end.
    pub async fn end(mut self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        self.tally()
    }
}

impl Shared {
    fn count(&self, result: anyhow::Result<String>, expected: &str, what: &str, good: impl FnOnce(&mut Tally)) {
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(text) if text == expected => good(&mut tally),
            Ok(text) => tally.wrong.push(format!("{what} says {text:?} and not {expected:?}")),
            Err(error) => {
                let error = format!("{what}: {error:#}");
                let told = error.contains("carries an error") || REFUSED.iter().any(|status| error.ends_with(status));
                if told { tally.told.push(error) } else { tally.wrong.push(error) }
            }
        }
    }
}

async fn stream(
    gateway: Gateway,
    model: String,
    expected: String,
    stop: Arc<AtomicBool>,
    shared: Arc<Shared>,
    pause: Duration,
) {
    let request = request(&model, STREAM_TOKENS, true);
    while !stop.load(Ordering::Relaxed) {
        let mut begun = false;
        let begin = |_: &str| {
            if !std::mem::replace(&mut begun, true) {
                shared.streaming.fetch_add(1, Ordering::Relaxed);
            }
        };
        let result = gateway.stream_chat(&request, begin).await;
        if begun {
            shared.streaming.fetch_sub(1, Ordering::Relaxed);
        }
        shared.count(result, &expected, &format!("a stream of {model}"), |tally| tally.streams += 1);
        sleep(pause).await;
    }
}

async fn short_ones(
    gateway: Gateway,
    model: String,
    expected: String,
    stop: Arc<AtomicBool>,
    shared: Arc<Shared>,
    pause: Duration,
) {
    while !stop.load(Ordering::Relaxed) {
        let result = ask(&gateway, &model).await;
        shared.count(result, &expected, &format!("a request of {model}"), |tally| tally.requests += 1);
        sleep(pause).await;
    }
}
