//! 100,000 features of GeoJSON: how soon they start to come, what they cost.

use crate::client::Reply;
use crate::memory;
use crate::peers::{FastCgi, Peer, Place, Server};
use crate::stats::{Demands, ms};

const MANY: &str =
    "SERVICE=WFS&VERSION=1.1.0&REQUEST=GetFeature&TYPENAME=many&OUTPUTFORMAT=GeoJSON";
const READERS: [(&str, usize); 2] = [("fast", usize::MAX), ("5 MB/s", 5 << 20)];

pub fn compare(place: &Place, demands: &mut Demands) {
    println!(
        "\nGetFeature, 100,000 features of GeoJSON, 1 worker; memory of server, pool and spare above idle\n"
    );
    println!("| server | reader | first byte ms | total ms | bytes | peak MB above idle |");
    println!("|---|---|---|---|---|---|");
    let fastcgi = FastCgi::start(place, 1);
    let theirs = fastcgi.serving(place, "many");
    let server = Server::start(place, 1);
    let ours = server.serving("many");
    for (reader, rate) in READERS {
        row("nginx + FastCGI", reader, &streamed(&theirs, rate));
        let (reply, above) = streamed(&ours, rate);
        demands.at_most(
            &format!("100,000 features, {reader} reader, first byte ms"),
            50.0,
            ms(reply.first_byte),
        );
        demands.at_most(
            &format!("100,000 features, {reader} reader, MB above idle"),
            32.0,
            above,
        );
        row("qgisserver", reader, &(reply, above));
    }
}

fn row(server: &str, reader: &str, (reply, above): &(Reply, f64)) {
    let (first, total) = (ms(reply.first_byte), ms(reply.total));
    println!(
        "| {server} | {reader} | {first:.1} | {total:.0} | {} | {above:.1} |",
        reply.bytes
    );
}

/// A few small requests first: the project is loaded and the worker warm.
fn streamed(peer: &Peer, rate: usize) -> (Reply, f64) {
    let mut client = peer.connect();
    for _ in 0..5 {
        client.expect(&peer.target(&format!("{MANY}&MAXFEATURES=10")));
    }
    let watch = memory::Watch::start(&peer.pids);
    let reply = client
        .get_slowly(&peer.target(MANY), rate)
        .expect("the server answers");
    assert_eq!(
        reply.status,
        200,
        "{}",
        String::from_utf8_lossy(&reply.start)
    );
    (reply, watch.most_above_start() as f64 / 1024.0)
}
