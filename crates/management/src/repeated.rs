//! Requests that are sent again: the header `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header).
//!
//! A client that does not know whether its request has arrived sends it again with the same key. The first one is done, on a task of its own,
//! whatever becomes of the connection that brought it; every other one gets the first one's answer, for which it waits if need be. What was refused
//! before anything was done, for want of room, is forgotten at once: the next one is the first.
//!
//! ```text
//!   request with key ──► Keys ──new──► task ──► route ──► answer ──┐
//!                          └──known, same request──── waits ───────┴──► client
//! ```
//!
//! Keys are kept in memory: [`MOST`] of them, for [`AGE`], with [`MAX_BYTES`] in all. They end with the process, as the devices of a machine do.

use std::collections::VecDeque;
use std::collections::hash_map::RandomState;
use std::future::Future;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::{Problem, ProblemKind};
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Body, Bytes};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION};
use hyper::{Method, Request, Response, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Instant;

use crate::page;
use crate::routes::{self, Answer, Content};

/// The header of a request.
pub(crate) const KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// The header of an answer that was given before.
pub(crate) const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
/// Keys that are kept.
const MOST: usize = 256;
/// How long a key is kept, from its request's end.
const AGE: Duration = Duration::from_secs(24 * 3600);
/// Bytes of all requests and answers that are kept; older ones go earlier if they have more.
const MAX_BYTES: usize = 8 << 20;
/// Longest key in bytes; a gateway puts its principal's name before that of its client.
const MAX_KEY: usize = 512;

/// An answer as it is kept.
#[derive(Debug, Clone)]
struct Kept {
    status: StatusCode,
    headers: Vec<(HeaderName, HeaderValue)>,
    body: Bytes,
}

impl Kept {
    /// Whether nothing was done, so that it makes sense to do it.
    fn is_forgotten(&self) -> bool {
        self.status == StatusCode::SERVICE_UNAVAILABLE
    }

    fn answer(&self) -> Answer {
        let mut answer = routes::empty(self.status);
        *answer.body_mut() = Either::Left(Full::from(self.body.clone()));
        for (name, value) in &self.headers {
            answer.headers_mut().insert(name, value.clone());
        }
        answer
    }
}

/// What a request is, so that another one is known to be another one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Asked {
    path: String,
    body: Bytes,
}

/// A key that somebody has used.
struct Entry {
    key: Bytes,
    asked: Asked,
    answer: watch::Receiver<Option<Kept>>,
    /// None while the first request is being done.
    ended: Option<Instant>,
}

impl Entry {
    fn bytes(&self) -> usize {
        let answer = self.answer.borrow();
        let answer = answer.as_ref().map_or(0, |kept| kept.body.len());
        self.key.len() + self.asked.body.len() + answer
    }
}

/// All keys of a server.
#[derive(Default, Clone)]
pub(crate) struct Keys(Arc<Mutex<VecDeque<Entry>>>);

/// What becomes of a request with a key.
enum Turn {
    /// It is done; where its answer is told.
    First(watch::Sender<Option<Kept>>),
    /// Another one has the answer, or will have it.
    Again(watch::Receiver<Option<Kept>>),
}

impl Keys {
    fn entries(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self, key: &Bytes, asked: Asked) -> Result<Turn, Problem> {
        let mut entries = self.entries();
        tidy(&mut entries);
        if let Some(entry) = entries.iter().find(|entry| entry.key == *key) {
            if entry.asked == asked {
                return Ok(Turn::Again(entry.answer.clone()));
            }
            let detail = match entry.asked.path == asked.path {
                true => "the key was used with another body".to_owned(),
                false => format!("the key was used for {}", entry.asked.path),
            };
            let problem = Problem::new(ProblemKind::KeyReused, detail).about("Idempotency-Key");
            return Err(problem.remedy("take a new key for every request that is not a repetition"));
        }
        // Those under way are not given up: their number is limited elsewhere.
        let (told, answer) = watch::channel(None);
        entries.push_back(Entry {
            key: key.clone(),
            asked,
            answer,
            ended: None,
        });
        Ok(Turn::First(told))
    }

    /// The first request with `key` has its answer.
    fn end(&self, key: &Bytes, told: &watch::Sender<Option<Kept>>, kept: Kept) {
        let mut entries = self.entries();
        match kept.is_forgotten() {
            true => entries.retain(|entry| entry.key != *key),
            false => entries
                .iter_mut()
                .filter(|entry| entry.key == *key)
                .for_each(|entry| entry.ended = Some(Instant::now())),
        }
        told.send_replace(Some(kept));
        tidy(&mut entries);
    }

    /// Answers a request with a key by `route`, or as it was answered before; `room` is for those who have to wait for that.
    pub(crate) async fn answer<F, B>(
        &self,
        key: Bytes,
        request: Request<Content>,
        room: impl FnOnce() -> Result<OwnedSemaphorePermit, Problem>,
        route: impl FnOnce(Request<Content>) -> F + Send + 'static,
    ) -> Result<Answer, Problem>
    where
        F: Future<Output = Response<B>> + Send + 'static,
        B: Body<Data = Bytes> + Send + 'static,
    {
        let (parts, body) = request.into_parts();
        let body = routes::bytes(body).await?;
        let asked = Asked {
            path: parts.uri.path().to_owned(),
            body: body.clone(),
        };
        let (mut answer, replayed) = match self.turn(&key, asked)? {
            Turn::Again(answer) => (answer, true),
            Turn::First(told) => {
                let answer = told.subscribe();
                let request = Request::from_parts(parts, Either::Right(Full::from(body)));
                let keys = self.clone();
                tokio::spawn(async move {
                    let kept = keep(route(request).await).await;
                    keys.end(&key, &told, kept);
                });
                (answer, false)
            }
        };
        let waits = replayed && answer.borrow().is_none();
        let _room = waits.then(room).transpose()?;
        let kept = answer.wait_for(Option::is_some).await;
        let kept = kept.map_err(|_| {
            Problem::new(
                ProblemKind::Host,
                "the request failed inside of smsvmm; see its log",
            )
        })?;
        let mut answer = kept.as_ref().map_or_else(routes::no_content, Kept::answer);
        if replayed {
            let headers = answer.headers_mut();
            headers.insert(REPLAYED, HeaderValue::from_static("true"));
        }
        Ok(answer)
    }
}

/// What is too old or too much goes, the oldest first.
fn tidy(entries: &mut VecDeque<Entry>) {
    // The first request failed without an answer.
    entries.retain(|entry| entry.ended.is_some() || entry.answer.has_changed().is_ok());
    let mut surplus = entries.len().saturating_sub(MOST);
    let mut bytes: usize = entries.iter().map(Entry::bytes).sum();
    entries.retain(|entry| {
        let Some(ended) = entry.ended else {
            return true;
        };
        let keep = ended.elapsed() < AGE && surplus == 0 && bytes <= MAX_BYTES;
        if !keep {
            surplus = surplus.saturating_sub(1);
            bytes -= entry.bytes();
        }
        keep
    });
}

async fn keep<B: Body<Data = Bytes>>(answer: Response<B>) -> Kept {
    let (parts, body) = answer.into_parts();
    let headers = [CONTENT_TYPE, LOCATION].into_iter().filter_map(|name| {
        let value = parts.headers.get(&name)?.clone();
        Some((name, value))
    });
    Kept {
        status: parts.status,
        headers: headers.collect(),
        // It is made already.
        body: body
            .collect()
            .await
            .map(|body| body.to_bytes())
            .unwrap_or_default(),
    }
}

/// The key of a request that may have one.
///
/// # Errors
/// It has one that is none, or more than one.
pub(crate) fn key<B>(request: &Request<B>) -> Result<Option<Bytes>, Problem> {
    let creates = request.method() == Method::POST
        && matches!(
            request.uri().path().split('/').skip(1).collect::<Vec<_>>()[..],
            ["v1", "vm", "disks" | "nets"] | ["v1", "storage"] | ["v1", "pools", _, "storage"]
        );
    if !creates {
        return Ok(None);
    }
    of_headers(request.headers())
}

/// The headers of a request by somebody whose keys are nobody else's.
pub(crate) fn of(principal: &str, headers: &HeaderMap) -> HeaderMap {
    let mut own = headers.clone();
    own.remove(KEY);
    for key in headers.get_all(KEY) {
        let name = page::encode(principal);
        let key = [name.as_bytes(), b":", key.as_bytes()].concat();
        own.append(
            KEY,
            HeaderValue::from_bytes(&key).unwrap_or(HeaderValue::from_static("")),
        );
    }
    own
}

/// A key that nobody else has.
pub(crate) fn new_key() -> String {
    // Each has a random state of its own.
    let random = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", random(), random())
}

fn of_headers(headers: &HeaderMap) -> Result<Option<Bytes>, Problem> {
    let mut values = headers.get_all(KEY).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let bytes = value.as_bytes();
    let is_good = !bytes.is_empty() && bytes.len() <= MAX_KEY && bytes.iter().all(u8::is_ascii_graphic);
    if !is_good || values.next().is_some() {
        let detail = format!("a request has one key of 1 to {MAX_KEY} visible ASCII characters");
        return Err(Problem::new(ProblemKind::Invalid, detail).about("Idempotency-Key"));
    }
    Ok(Some(Bytes::copy_from_slice(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(body: &'static str) -> Asked {
        Asked {
            path: "/v1/storage".to_owned(),
            body: Bytes::from_static(body.as_bytes()),
        }
    }

    fn kept(status: StatusCode, length: usize) -> Kept {
        Kept {
            status,
            headers: Vec::new(),
            body: Bytes::from(vec![b'x'; length]),
        }
    }

    /// Does a request, and says whether it was the first of its key.
    fn first(keys: &Keys, key: &str, end: Kept) -> bool {
        let key = Bytes::copy_from_slice(key.as_bytes());
        match keys.turn(&key, asked("a")).unwrap() {
            Turn::First(told) => {
                keys.end(&key, &told, end);
                true
            }
            Turn::Again(_) => false,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_is_kept_for_a_day_and_its_request_is_the_only_one() {
        let keys = Keys::default();
        assert!(first(&keys, "one", kept(StatusCode::CREATED, 1)));
        assert!(!first(&keys, "one", kept(StatusCode::CREATED, 1)));
        let other = keys.turn(&Bytes::from_static(b"one"), asked("b"));
        assert_eq!(other.err().unwrap().kind, ProblemKind::KeyReused);
        tokio::time::advance(AGE).await;
        assert!(first(&keys, "one", kept(StatusCode::CREATED, 1)));
    }

    #[tokio::test]
    async fn what_was_not_done_for_want_of_room_may_be_done() {
        let keys = Keys::default();
        assert!(first(&keys, "one", kept(StatusCode::SERVICE_UNAVAILABLE, 1)));
        assert!(first(&keys, "one", kept(StatusCode::CONFLICT, 1)));
        assert!(!first(&keys, "one", kept(StatusCode::OK, 1)));
    }

    #[tokio::test]
    async fn only_so_many_keys_and_bytes_are_kept_and_none_that_is_under_way_goes() {
        let keys = Keys::default();
        let Ok(Turn::First(told)) = keys.turn(&Bytes::from_static(b"slow"), asked("a")) else {
            panic!("it is the first");
        };
        for number in 0..2 * MOST {
            assert!(first(&keys, &number.to_string(), kept(StatusCode::OK, 1)));
        }
        assert_eq!(keys.entries().len(), MOST);
        let last = (2 * MOST - 1).to_string();
        assert!(!first(&keys, &last, kept(StatusCode::OK, 1)));
        assert!(!first(&keys, "slow", kept(StatusCode::OK, 1)));
        assert!(first(&keys, "large", kept(StatusCode::OK, MAX_BYTES - 15)));
        assert!(!first(&keys, "large", kept(StatusCode::OK, 1)));
        assert!(first(&keys, &last, kept(StatusCode::OK, 1)), "it made room");
        keys.end(&Bytes::from_static(b"slow"), &told, kept(StatusCode::OK, 1));
        assert!(!first(&keys, "slow", kept(StatusCode::OK, 1)));
        // A task that panicked leaves nothing that others would wait for.
        drop(keys.turn(&Bytes::from_static(b"broken"), asked("a")));
        assert!(first(&keys, "broken", kept(StatusCode::OK, 1)));
    }

    #[test]
    fn keys_are_short_visible_and_one() {
        let headers = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(KEY, value.parse().unwrap());
            }
            of_headers(&headers)
        };
        assert_eq!(headers(&[]).unwrap(), None);
        assert_eq!(headers(&["\"8e03978e\""]).unwrap().unwrap(), "\"8e03978e\"");
        let long = "x".repeat(MAX_KEY + 1);
        for wrong in [&[""][..], &["a b"], &["a", "b"], &[&long]] {
            assert_eq!(
                headers(wrong).unwrap_err().kind,
                ProblemKind::Invalid,
                "{wrong:?}"
            );
        }
    }
}
