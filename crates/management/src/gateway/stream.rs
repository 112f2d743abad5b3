//! The answers of machines, as long as who asked may see them.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};

/// Whether something is still so.
type Check = Box<dyn FnMut() -> bool + Send>;

/// The body of a machine's answer. It may be asked before each piece whether it may go on; if not, it ends there.
pub(crate) struct Watched {
    body: Incoming,
    may_go_on: Option<Check>,
}

impl Watched {
    /// A body that is passed on as it is.
    pub(crate) fn new(body: Incoming) -> Self {
        Self {
            body,
            may_go_on: None,
        }
    }

    /// The same one, which ends when `may_go_on` says no.
    pub(crate) fn while_(self, may_go_on: impl FnMut() -> bool + Send + 'static) -> Self {
        Self {
            may_go_on: Some(Box::new(may_go_on)),
            ..self
        }
    }
}

impl Body for Watched {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        let goes_on = self.may_go_on.as_mut().is_none_or(|may_go_on| may_go_on());
        Poll::Ready(frame.filter(|_| goes_on))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
