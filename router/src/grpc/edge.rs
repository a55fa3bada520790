//! What every call passes on its way in: bounds on what its client sends, and errors that say what was wrong with it.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::http;
use baton_node::status;
use baton_proto::node::v1::registry_server::SERVICE_NAME as REGISTRY;
use futures_util::StreamExt;
use tokio::time::Instant;
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use crate::{
    GenerateError,
    intake::{Intake, IntakeError},
    limits,
};

/// When a call's headers had been read: its client's timeout counts from then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrived(pub(crate) Instant);

/// Puts [`Edge`] around the services.
#[derive(Clone)]
pub(crate) struct EdgeLayer(pub(crate) Intake);

impl<S> Layer<S> for EdgeLayer {
    type Service = Edge<S>;

    fn layer(&self, inner: S) -> Edge<S> {
        Edge {
            inner,
            intake: self.0.clone(),
        }
    }
}

/// A service behind the bounds.
#[derive(Clone)]
pub(crate) struct Edge<S> {
    inner: S,
    intake: Intake,
}

impl<S> Service<http::Request<Body>> for Edge<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        // A node's stream lasts as long as its membership; it has bounds of its own.
        if request.uri().path()[1..].starts_with(REGISTRY) {
            return Box::pin(self.inner.call(request));
        }
        let arrived = Instant::now();
        request.extensions_mut().insert(Arrived(arrived));
        let patience = super::timeout(request.headers()).map_or(limits::RECEIVE, |timeout| {
            limits::RECEIVE.min(timeout.saturating_sub(limits::DEADLINE_MARGIN))
        });
        let expires = patience < limits::RECEIVE;
        let bounded = |body| {
            let body = self.intake.bounded(axum::body::Body::new(body), arrived + patience);
            let body = body.map(move |bytes| bytes.map_err(|error| refused(error, expires)));
            Body::new(axum::body::Body::from_stream(body))
        };
        let call = self.inner.call(request.map(bounded));
        Box::pin(async move { Ok(explained(call.await?)) })
    }
}

/// `expires`: the client's own deadline was the bound.
fn refused(error: IntakeError, expires: bool) -> Status {
    let problem = error.to_string();
    match error {
        IntakeError::Full => super::Spelling("input").status(&GenerateError::Overloaded),
        IntakeError::Slow if expires => {
            let error = GenerateError::DeadlineExceeded("before the request had come");
            super::Spelling("input").status(&error)
        }
        IntakeError::Slow => status::error(Code::DeadlineExceeded, "BODY_TIMEOUT", problem).build(),
        IntakeError::TooLarge(_) => status::error(Code::InvalidArgument, "BODY_TOO_LARGE", problem).build(),
        // Nobody is left to read it.
        IntakeError::Broken(_) => status::error(Code::Cancelled, "CANCELLED", problem).build(),
    }
}

/// Messages that cannot be decoded are refused by the library, in its own words and as if the fault were ours. Errors of ours all carry details.
fn explained(response: http::Response<Body>) -> http::Response<Body> {
    let Some(status) = Status::from_header_map(response.headers()) else {
        return response;
    };
    let reason = match status.code() {
        _ if !status.details().is_empty() => return response,
        Code::OutOfRange => "BODY_TOO_LARGE",
        Code::Internal => "MALFORMED",
        _ => return response,
    };
    let message = format!("the request could not be read: {}", status.message());
    status::error(Code::InvalidArgument, reason, message)
        .build()
        .into_http()
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, time::Duration};

    use bytes::Bytes;

    use super::*;

    /// Reads the whole message, and fails as the library does when it cannot.
    #[derive(Clone)]
    struct Reads;

    impl Service<http::Request<Body>> for Reads {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            Box::pin(async move {
                let read = axum::body::to_bytes(axum::body::Body::new(request.into_body()), 1 << 20).await;
                let status = read.map_or_else(|error| Status::from_error(error.into()), |_| Status::ok("read"));
                Ok(status.into_http())
            })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_does_not_come_is_given_up_before_the_clients_deadline() {
        let path = "/baton.v1.Generation/Generate";
        let announce = format!("/{REGISTRY}/Announce");
        for (path, client, bound, reason) in [
            (path, Some("20S"), Duration::from_secs(20), Some("DEADLINE_EXCEEDED")),
            (path, None, limits::RECEIVE, Some("BODY_TIMEOUT")),
            (&announce, None, 2 * limits::RECEIVE, None),
        ] {
            let never = futures_util::stream::pending::<Result<Bytes, Infallible>>();
            let body = Body::new(axum::body::Body::from_stream(never));
            let mut request = http::Request::post(path).body(body).expect("a request");
            if let Some(client) = client {
                request
                    .headers_mut()
                    .insert("grpc-timeout", client.parse().expect("ASCII"));
            }
            let mut edge = EdgeLayer(Intake::new()).layer(Reads);
            let answer = tokio::time::timeout(bound, edge.call(request)).await.ok();
            let status = answer.and_then(|Ok(answer)| Status::from_header_map(answer.headers()));
            let found = status.map(|status| (status.code(), status::reason(&status).expect("a reason")));
            let expected = reason.map(|reason| (Code::DeadlineExceeded, reason.to_owned()));
            assert_eq!(found, expected, "{path}");
        }
    }
}
