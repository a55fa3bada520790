//! Connections to decode nodes, one per address, kept and bounded.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use tonic::transport::{Channel, ClientTlsConfig, Endpoint, Error};

use super::configure_endpoint;
use crate::limits;

/// Channels connect when first used, and again after their connection broke.
pub(super) struct Peers {
    /// `None`: no TLS.
    tls: Option<ClientTlsConfig>,
    /// Most recently used last.
    channels: Mutex<VecDeque<(String, Channel)>>,
}

impl Peers {
    pub(super) fn new(tls: Option<ClientTlsConfig>) -> Self {
        Self {
            tls,
            channels: Mutex::default(),
        }
    }

    /// The channel to `address` (host:port). Must be called on a runtime. Fails when the address makes no sense.
    pub(super) fn channel(&self, address: &str) -> Result<Channel, Error> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = match channels.iter().position(|(known, _)| known == address) {
            Some(at) => channels.remove(at).expect("found just now"),
            None => {
                let endpoint = match &self.tls {
                    Some(tls) => Endpoint::from_shared(format!("https://{address}"))?.tls_config(tls.clone())?,
                    None => Endpoint::from_shared(format!("http://{address}"))?,
                };
                (address.to_owned(), configure_endpoint(endpoint).connect_lazy())
            }
        };
        let channel = entry.1.clone();
        if channels.len() >= limits::MAX_PEERS {
            channels.pop_front();
        }
        channels.push_back(entry);
        Ok(channel)
    }
}
