//! A connection of the `webrtc` crate, set up as browsers do, and what it tells the peer.

use std::sync::Arc;

use genosdb::PeerId;
use tokio::sync::mpsc;
use webrtc::api::APIBuilder;
use webrtc::api::setting_engine::SettingEngine;
use webrtc::data_channel::RTCDataChannel;
use webrtc::peer_connection::RTCPeerConnection;
use webrtc::peer_connection::configuration::RTCConfiguration;
use webrtc::peer_connection::sdp::session_description::RTCSessionDescription;

/// What happens on the connection with a peer.
pub(super) enum Event {
    Opened(PeerId, Arc<RTCDataChannel>),
    Frame(PeerId, Vec<u8>),
    Closed(PeerId),
}

pub(super) async fn connection() -> Arc<RTCPeerConnection> {
    // The crate asks for the process's provider; a second test of the process finds it there.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let mut settings = SettingEngine::default();
    settings.set_include_loopback_candidate(true);
    settings.set_ice_multicast_dns_mode(webrtc::ice::mdns::MulticastDnsMode::Disabled);
    let api = APIBuilder::new().with_setting_engine(settings).build();
    Arc::new(api.new_peer_connection(RTCConfiguration::default()).await.unwrap())
}

/// Sets the local description, waits for its candidates, and returns it whole: nothing is trickled.
pub(super) async fn described(connection: &RTCPeerConnection, description: RTCSessionDescription) -> String {
    let mut gathered = connection.gathering_complete_promise().await;
    connection.set_local_description(description).await.unwrap();
    let _ = gathered.recv().await;
    connection.local_description().await.unwrap().sdp
}

pub(super) fn watch_channel(peer: PeerId, channel: &Arc<RTCDataChannel>, events: &mpsc::UnboundedSender<Event>) {
    let (sender, opened) = (events.clone(), Arc::clone(channel));
    channel.on_open(Box::new(move || {
        let _ = sender.send(Event::Opened(peer, opened));
        Box::pin(async {})
    }));
    let sender = events.clone();
    channel.on_message(Box::new(move |message| {
        let _ = sender.send(Event::Frame(peer, message.data.to_vec()));
        Box::pin(async {})
    }));
    let sender = events.clone();
    channel.on_close(Box::new(move || {
        let _ = sender.send(Event::Closed(peer));
        Box::pin(async {})
    }));
}
