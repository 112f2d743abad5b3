//! Events as they happen: server-sent events (WHATWG HTML, section 9.2), which `curl -N` and every browser understand.
//!
//! ```text
//!   EventLog ──number of the newest──► watch ──► one task per stream ──one chunk──► body ──► hyper ──► client
//!       └────────────── the next page, when the client has taken the one before ──────┘
//! ```
//!
//! A stream remembers a number and nothing else: what a client has not taken yet stays in the log, which is bounded. Who is too
//! slow for it is told how much was missed, by an event of the type `missed`. There are at most [`MAX_STREAMS`] streams. The
//! connection of a client that takes nothing is closed by [`life`](crate::life), for there is something to take every
//! [`KEEP_ALIVE`].

use std::fmt::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use api::{EventKind, EventLog, EventPage, Problem, ProblemKind};
use http_body_util::Either;
use hyper::body::{Body, Bytes, Frame};
use hyper::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::sleep;

use crate::routes::{self, Answer};

/// The media type of a stream.
pub(crate) const MEDIA_TYPE: &str = "text/event-stream";
/// The header by which a client goes on where it was.
pub(crate) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Streams at a time; connections for other requests are left.
pub(crate) const MAX_STREAMS: usize = 16;
/// How long nothing is sent, at most. Proxies close what is silent for a minute; `life` what is not taken for half of one.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Events of one chunk.
const PAGE: usize = 32;
/// How long a client shall wait before it connects again, in milliseconds.
const RETRY_MS: u32 = 2000;

/// Whether a client wants a stream, and not a page.
pub(crate) fn is_wanted(headers: &HeaderMap) -> bool {
    let ranges = headers.get_all(ACCEPT).iter();
    let mut ranges = ranges
        .filter_map(|value| value.to_str().ok())
        .flat_map(|text| text.split(','));
    ranges.any(|range| {
        let mut parts = range.split(';').map(str::trim);
        let is_stream = parts
            .next()
            .is_some_and(|kind| kind.eq_ignore_ascii_case(MEDIA_TYPE));
        // RFC 9110, section 12.4.2: what has the weight 0 is not acceptable.
        is_stream && !parts.any(|parameter| matches!(parameter, "q=0" | "q=0.0" | "q=0.00" | "q=0.000"))
    })
}

/// The number after which a client wants to go on, if it says one.
pub(crate) fn last_event_id(headers: &HeaderMap) -> Result<Option<u64>, Problem> {
    let Some(value) = headers.get(LAST_EVENT_ID) else {
        return Ok(None);
    };
    let number = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    number.map(Some).ok_or_else(|| {
        Problem::new(ProblemKind::Invalid, "it is not a number of an event")
            .about(LAST_EVENT_ID)
            .remedy("send the `id` of the last event that was received, or leave it out")
    })
}

/// The streams of a server.
pub(crate) struct Streams {
    room: Arc<Semaphore>,
    ending: watch::Sender<bool>,
}

impl Streams {
    pub(crate) fn new() -> Self {
        Self {
            room: Arc::new(Semaphore::new(MAX_STREAMS)),
            ending: watch::Sender::new(false),
        }
    }

    /// Has all streams end when they have sent what there is.
    pub(crate) fn end(&self) {
        self.ending.send_replace(true);
    }

    /// A stream of the events of `owner`, with numbers above `after`; `news` has the number of the newest.
    pub(crate) fn open<S: ?Sized + Send + Sync + 'static>(
        &self,
        owner: Arc<S>,
        log: fn(&S) -> &EventLog,
        news: watch::Receiver<u64>,
        after: u64,
    ) -> Result<Answer, Problem> {
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            let detail = format!("{MAX_STREAMS} clients follow the events already");
            let problem = Problem::new(ProblemKind::Exhausted, detail);
            return Err(problem.remedy("end one of them, or ask for pages with ?after=N&wait=SECONDS"));
        };
        // A number that is still to come was given by an earlier process, whose log is gone.
        let after = if after > log(&owner).last() { 0 } else { after };
        let (chunks, body) = mpsc::channel(1);
        let feeder = Feeder {
            news,
            ending: self.ending.subscribe(),
            chunks,
            after,
        };
        tokio::spawn(feeder.run(room, move |after| log(&owner).page(after, PAGE)));
        let mut answer = Response::new(Either::Right(Feed(body)));
        *answer.status_mut() = StatusCode::OK;
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        Ok(answer)
    }
}

/// The body of a stream.
pub(crate) struct Feed(mpsc::Receiver<Bytes>);

impl Body for Feed {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.0
            .poll_recv(context)
            .map(|chunk| chunk.map(|bytes| Ok(Frame::data(bytes))))
    }
}

/// What fills a stream.
struct Feeder {
    news: watch::Receiver<u64>,
    ending: watch::Receiver<bool>,
    chunks: mpsc::Sender<Bytes>,
    after: u64,
}

impl Feeder {
    /// Sends events until the client has gone, the machine has ended or the server ends.
    async fn run(mut self, _room: OwnedSemaphorePermit, page: impl Fn(u64) -> EventPage) {
        let mut text = format!("retry: {RETRY_MS}\n\n");
        let mut last_look = false;
        loop {
            let page = page(self.after);
            write_page(&mut text, &page);
            self.after = page.last;
            let more = !page.events.is_empty();
            let stopped = page
                .events
                .iter()
                .any(|event| matches!(event.kind, EventKind::Stopped { .. }));
            if !text.is_empty() && self.chunks.send(std::mem::take(&mut text).into()).await.is_err() {
                return;
            }
            if stopped || (last_look && !more) {
                return;
            }
            if more {
                continue;
            }
            let after = self.after;
            tokio::select! {
                heard = self.news.wait_for(|last| *last > after) => last_look = heard.is_err(),
                _ = self.ending.wait_for(|ending| *ending) => last_look = true,
                () = self.chunks.closed() => return,
                () = sleep(KEEP_ALIVE) => text.push_str(":\n\n"),
            }
        }
    }
}

/// A page in the format of streams.
fn write_page(text: &mut String, page: &EventPage) {
    // Writing to a string cannot fail.
    if page.missed > 0 {
        let _ = write!(text, "event: missed\ndata: {{\"missed\":{}}}\n\n", page.missed);
    }
    for event in &page.events {
        let json = routes::to_json(event);
        // JSON as it is made here has no line break but the last one.
        let json = String::from_utf8_lossy(&json);
        let _ = write!(text, "id: {}\ndata: {}\n\n", event.sequence, json.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use api::ExitReason;
    use http_body_util::BodyExt;

    use super::*;

    fn headers(name: HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn a_stream_is_for_those_who_ask_for_one() {
        for (accept, wanted) in [
            ("text/event-stream", true),
            ("application/json;q=0.5, Text/Event-Stream; q=0.9", true),
            ("application/json, text/event-stream;q=0", false),
            ("*/*", false),
            ("text/event-streams", false),
        ] {
            assert_eq!(is_wanted(&headers(ACCEPT, accept)), wanted, "{accept}");
        }
        assert_eq!(last_event_id(&HeaderMap::new()).unwrap(), None);
        assert_eq!(last_event_id(&headers(LAST_EVENT_ID, "17")).unwrap(), Some(17));
        for wrong in ["", "x", "-1", "99999999999999999999"] {
            let problem = last_event_id(&headers(LAST_EVENT_ID, wrong)).unwrap_err();
            assert_eq!(problem.kind, ProblemKind::Invalid, "{wrong}");
        }
    }

    struct Setup {
        log: Arc<EventLog>,
        news: watch::Receiver<u64>,
        streams: Streams,
    }

    impl Setup {
        fn new() -> Self {
            let log = Arc::new(EventLog::new());
            let (told, news) = watch::channel(0);
            log.listen(move |sequence| {
                told.send_replace(sequence);
            });
            Self {
                log,
                news,
                streams: Streams::new(),
            }
        }

        fn open(&self, after: u64) -> Result<Answer, Problem> {
            let log = Arc::clone(&self.log);
            self.streams.open(log, |log| log, self.news.clone(), after)
        }
    }

    async fn next(answer: &mut Answer) -> Option<String> {
        let frame = answer.body_mut().frame().await?.unwrap();
        Some(String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn events_come_as_they_happen_until_the_machine_ends() {
        let setup = Setup::new();
        setup.log.record(EventKind::Started);
        let mut answer = setup.open(0).unwrap();
        let text = next(&mut answer).await.unwrap();
        assert!(
            text.starts_with("retry: 2000\n\nid: 1\ndata: {\"sequence\":1,"),
            "{text}"
        );
        assert!(text.ends_with("\"event\":\"started\"}\n\n"), "{text}");
        assert_eq!(
            next(&mut answer).await.unwrap(),
            ":\n\n",
            "the clock runs by itself"
        );
        setup.log.record(EventKind::Paused);
        assert!(next(&mut answer).await.unwrap().starts_with("id: 2\n"));
        let reason = ExitReason::PowerOff;
        setup.log.record(EventKind::Stopped { reason });
        assert!(next(&mut answer).await.unwrap().contains("power-off"));
        assert_eq!(next(&mut answer).await, None);
    }

    #[tokio::test]
    async fn a_client_goes_on_where_it_was_and_learns_what_it_missed() {
        let setup = Setup::new();
        for _ in 0..EventLog::CAPACITY + 5 {
            setup.log.record(EventKind::Paused);
        }
        let mut answer = setup.open(2).unwrap();
        let text = next(&mut answer).await.unwrap();
        assert!(
            text.contains("event: missed\ndata: {\"missed\":3}\n\nid: 6\n"),
            "{text}"
        );
        // Of an earlier process.
        let mut answer = setup.open(1_000_000).unwrap();
        let text = next(&mut answer).await.unwrap();
        assert!(
            text.contains("{\"missed\":5}") && text.contains("id: 6\n"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn a_slow_reader_holds_two_chunks_and_its_place_in_the_log() {
        let setup = Setup::new();
        let mut answer = setup.open(0).unwrap();
        for _ in 0..EventLog::CAPACITY {
            setup.log.record(EventKind::Paused);
        }
        tokio::task::yield_now().await;
        let Either::Right(feed) = answer.body() else {
            panic!("not a stream")
        };
        assert_eq!(feed.0.len(), 1);
        let mut got = 0;
        while got < EventLog::CAPACITY {
            let text = next(&mut answer).await.unwrap();
            let events = text.matches("id: ").count();
            assert!(events <= PAGE);
            got += events;
        }
        assert_eq!(got, EventLog::CAPACITY);
    }

    #[tokio::test]
    async fn streams_are_bounded_and_room_comes_back() {
        let setup = Setup::new();
        let mut all: Vec<Answer> = (0..MAX_STREAMS).map(|_| setup.open(0).unwrap()).collect();
        let problem = setup.open(0).err().unwrap();
        assert_eq!(problem.kind, ProblemKind::Exhausted);
        all.pop();
        while setup.streams.room.available_permits() == 0 {
            tokio::task::yield_now().await;
        }
        let mut answer = setup.open(0).unwrap();
        // What happened is told before the end.
        setup.log.record(EventKind::Started);
        setup.streams.end();
        let mut text = String::new();
        while let Some(chunk) = next(&mut answer).await {
            text.push_str(&chunk);
        }
        assert!(text.contains("started"), "{text}");
    }
}
