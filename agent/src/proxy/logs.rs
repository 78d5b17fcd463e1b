//! `GET /logs/<instance>?tail=N&follow=true`: the last lines of a llama-server's log, and new ones as they are written.

use super::{
    answer::{self, Body, BoxError, Code},
    route::Table,
    tail::Reader,
};
use bytes::Bytes;
use futures::TryStreamExt as _;
use http::{HeaderValue, Response, header};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use std::{sync::Arc, time::Duration};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;

/// How often a followed log is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Log streams at a time.
const FOLLOWERS_MAX: usize = 64;
const TAIL_DEFAULT: usize = 100;
const TAIL_MAX: usize = 10_000;

/// Places for log streams.
#[derive(Debug, Clone)]
pub(super) struct Followers(Arc<Semaphore>);

impl Followers {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(FOLLOWERS_MAX)))
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    tail: usize,
    follow: bool,
}

fn parse(query: Option<&str>) -> Result<Wanted, String> {
    let mut wanted = Wanted { tail: TAIL_DEFAULT, follow: false };
    for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=').unwrap_or((pair, "")) {
            ("tail", n) => {
                wanted.tail = n
                    .parse()
                    .ok()
                    .filter(|n| (1..=TAIL_MAX).contains(n))
                    .ok_or_else(|| format!("tail = \"{}\": use 1 to {TAIL_MAX}", n.escape_default()))?;
            }
            ("follow", "true" | "") => wanted.follow = true,
            ("follow", "false") => wanted.follow = false,
            ("follow", other) => return Err(format!("follow = \"{}\": use true or false", other.escape_default())),
            (other, _) => return Err(format!("\"{}\" is unknown: use tail and follow", other.escape_default())),
        }
    }
    Ok(wanted)
}

/// Answers a request for logs.
pub(super) async fn answer(
    table: &Arc<Table>,
    followers: &Followers,
    instance: &str,
    query: Option<&str>,
) -> Response<Body> {
    let wanted = match parse(query) {
        Ok(wanted) => wanted,
        Err(message) => return answer::error(Code::Invalid, &message),
    };
    let Some(route) = table.route(instance) else {
        return answer::error(Code::NoRoute, &format!("instance {instance} is not known on this host"));
    };
    let Ok(place) = followers.0.clone().try_acquire_owned() else {
        return answer::error(Code::Busy, &format!("{FOLLOWERS_MAX} logs are being read already: try again later"));
    };
    let (lines, receiver) = mpsc::channel(16);
    let table = table.clone();
    let instance = instance.to_owned();
    tokio::spawn(async move {
        if let Err(error) = send(&table, &instance, &route.log_dir, wanted, &lines, place).await {
            tracing::warn!(instance, log_dir = %route.log_dir.display(), %error, "the log can't be read");
            let _ = lines.send(Err(error)).await;
        }
    });
    let frames = ReceiverStream::new(receiver).map_ok(Frame::data).map_err(BoxError::from);
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

type Sender = mpsc::Sender<std::io::Result<Bytes>>;

/// Reads and sends until all is sent, the reader has gone, or the instance is gone from this host.
async fn send(
    table: &Table,
    instance: &str,
    folder: &std::path::Path,
    wanted: Wanted,
    out: &Sender,
    _place: OwnedSemaphorePermit,
) -> std::io::Result<()> {
    let folder = folder.to_owned();
    let (mut reader, mut lines) = blocking(move || Reader::open(&folder, wanted.tail)).await?;
    if !wanted.follow {
        lines.extend(reader.finish());
        give(out, &lines).await;
        return Ok(());
    }
    if !give(out, &lines).await {
        return Ok(());
    }
    loop {
        let known = table.route(instance).is_some();
        (reader, lines) = blocking(move || {
            let lines = reader.step()?;
            Ok((reader, lines))
        })
        .await?;
        if !lines.is_empty() {
            if !give(out, &lines).await {
                return Ok(());
            }
        } else if !known {
            lines.extend(reader.finish());
            give(out, &lines).await;
            return Ok(());
        } else {
            tokio::select! {
                () = out.closed() => return Ok(()),
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
        }
    }
}

/// False when nobody reads any more.
async fn give(out: &Sender, lines: &[String]) -> bool {
    for some in lines.chunks(256) {
        let mut text = some.join("\n");
        text.push('\n');
        if out.send(Ok(text.into())).await.is_err() {
            return false;
        }
    }
    true
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_question_is_refused_with_field_and_value() {
        assert_eq!(parse(None), Ok(Wanted { tail: 100, follow: false }));
        assert_eq!(parse(Some("tail=5&follow=true")), Ok(Wanted { tail: 5, follow: true }));
        for (query, named) in [("tail=0", "tail = \"0\""), ("tail=x", "10000"), ("follow=yes", "yes"), ("n=1", "\"n\"")]
        {
            let error = parse(Some(query)).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
