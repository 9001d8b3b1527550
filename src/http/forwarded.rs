//! The public base URL of a request: from Host, or from what a trusted proxy
//! says (RFC 7239 and the headers that were there before it).
//!
//! Everything that ends up in the URL is validated here. Proxies append to what came,
//! so of a list the element counts that the outermost trusted proxy wrote, counted from
//! the end: what stands before it anybody may have sent. A malformed value of a proxy is
//! as good as none; a malformed Host is refused.

use std::net::{IpAddr, Ipv6Addr};

use hyper::header::{HOST, HeaderMap};
use hyper::http::uri::Authority;
use hyper::{Uri, Version};

/// A longer name of a client is none.
const NAME_MAX: usize = 200;

/// Where web services are.
const SERVICES: &str = "/ows";

/// Where the client believes that we live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    pub scheme: String,
    /// Host and port.
    pub authority: String,
    /// Empty, or a path that starts with a slash and ends without.
    pub prefix: String,
    /// The path of web services, where a proxy says it whole.
    pub services: Option<String>,
}

/// What the proxies in front of us say.
#[derive(Debug, Clone, Copy)]
pub struct Said<'a> {
    headers: &'a HeaderMap,
    /// Those that are trusted; each appends to lists.
    proxies: usize,
}

impl<'a> Said<'a> {
    pub fn new(headers: &'a HeaderMap, proxies: usize) -> Self {
        Self { headers, proxies }
    }

    /// The client's address. By far most proxies say it in X-Forwarded-For, and pass a
    /// Forwarded on that clients send.
    pub fn client(self) -> Option<IpAddr> {
        self.get("x-forwarded-for")
            .or_else(|| find(&self.forwarded(), "for").map(str::to_owned))
            .or_else(|| self.get("x-real-ip"))
            .and_then(|node| address(&node))
    }

    /// What the outermost proxy wrote into a list.
    fn get(&self, name: &str) -> Option<String> {
        let whole = combined(self.headers, name)?;
        let all: Vec<&str> = whole.split(',').map(str::trim).collect();
        let all: Vec<&str> = all.into_iter().filter(|it| !it.is_empty()).collect();
        self.outermost(&all).map(|it| (*it).to_owned())
    }

    /// The same of a header that is an address, in which commas are its own.
    fn url(&self, name: &str) -> Option<String> {
        let lines: Vec<_> = self.headers.get_all(name).iter().collect();
        let line = self.outermost(&lines)?;
        Some(line.to_str().ok()?.trim().to_owned())
    }

    /// The same of `Forwarded`; nothing if that is malformed.
    fn forwarded(&self) -> Vec<(String, String)> {
        let all = combined(self.headers, "forwarded").and_then(|value| parse(&value));
        let all = all.unwrap_or_default();
        self.outermost(&all).cloned().unwrap_or_default()
    }

    /// Where there are fewer than proxies, some of these replace what came.
    fn outermost<'e, T>(&self, all: &'e [T]) -> Option<&'e T> {
        all.get(all.len().saturating_sub(self.proxies))
    }
}

/// The Host of a request is missing, repeated or malformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadHost;

impl Base {
    /// The base without any proxy. HTTP/1.0 may come without a Host; then
    /// `local`, the address of our end, has to do.
    pub fn direct(
        scheme: &str,
        uri: &Uri,
        version: Version,
        headers: &HeaderMap,
        local: &str,
    ) -> Result<Self, BadHost> {
        let mut hosts = headers.get_all(HOST).iter();
        let host = match (uri.authority(), hosts.next(), hosts.next()) {
            (_, _, Some(_)) => return Err(BadHost),
            (Some(authority), _, _) => authority.as_str(),
            (None, Some(host), None) => host.to_str().map_err(|_| BadHost)?,
            (None, None, None) if version <= Version::HTTP_10 => local,
            (None, None, None) => return Err(BadHost),
        };
        let authority = authority(host).ok_or(BadHost)?;
        Ok(Self {
            scheme: scheme.into(),
            authority,
            prefix: String::new(),
            services: None,
        })
    }

    /// As the proxies in front of us see it, of a request for `path`; `proxy_url` is
    /// fixed by the operator.
    pub fn behind_proxy(self, proxy_url: Option<&str>, path: &str, said: Said) -> Self {
        let url = |name| said.url(name);
        let fixed = proxy_url.and_then(Self::of_url);
        fixed
            .or_else(|| url("x-forwarded-url").and_then(|url| Self::of_url(&url)))
            .or_else(|| url("x-qgis-forwarded-url").and_then(|url| Self::of_request(&url, path)))
            .unwrap_or_else(|| self.piecewise(said))
    }

    /// The public address of what is at `path` here.
    pub fn with(&self, path: &str) -> String {
        let site = format!("{}://{}", self.scheme, self.authority);
        match &self.services {
            Some(whole) if is_services(path) => format!("{site}{whole}"),
            _ => format!("{site}{}{path}", self.prefix),
        }
    }

    /// What a header says about paths.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        [self.prefix.as_str()]
            .into_iter()
            .chain(self.services.as_deref())
    }

    /// The same, but web services are found below the prefix like all the rest.
    pub fn below_prefix(&self) -> Self {
        Self {
            services: None,
            ..self.clone()
        }
    }

    /// The same site without what a header says about paths.
    pub fn at_root(self) -> Self {
        Self {
            prefix: String::new(),
            services: None,
            ..self
        }
    }

    /// To which paths are added.
    pub fn of_url(url: &str) -> Option<Self> {
        let uri: Uri = url.trim().parse().ok()?;
        Some(Self {
            scheme: scheme(uri.scheme_str()?)?,
            authority: authority(uri.authority()?.as_str())?,
            prefix: prefix(uri.path())?,
            services: None,
        })
    }

    /// py-qgis-server hands this one on as it is: to web services it is their whole
    /// address. Other paths are found below what stands before that of the request or,
    /// where a proxy says the same to all, before that of web services.
    fn of_request(url: &str, path: &str) -> Option<Self> {
        let said = Self::of_url(url)?;
        let own = path.trim_end_matches('/');
        let above = |path: &str| said.prefix.strip_suffix(path).filter(|_| !path.is_empty());
        let prefix = above(own).or_else(|| above(SERVICES));
        let uri: Uri = url.trim().parse().ok()?;
        Some(Self {
            prefix: prefix.unwrap_or(&said.prefix).to_owned(),
            services: is_services(path).then(|| uri.path().to_owned()),
            ..said
        })
    }

    fn piecewise(self, said: Said) -> Self {
        let forwarded = said.forwarded();
        let of_forwarded = |name: &str| find(&forwarded, name);
        let of_header = |name: &str| said.get(name);
        let scheme = of_header("x-forwarded-proto")
            .and_then(|name| scheme(&name))
            .or_else(|| of_header("x-scheme").and_then(|name| scheme(&name)))
            .or_else(|| of_forwarded("proto").and_then(scheme))
            .unwrap_or(self.scheme);
        let port = of_header("x-forwarded-port");
        let host = of_header("x-forwarded-host")
            .and_then(|host| authority(&host))
            .map(|host| with_port(host, port.as_deref(), &scheme))
            .or_else(|| of_forwarded("host").and_then(authority));
        Self {
            authority: host.unwrap_or(self.authority),
            prefix: of_header("x-forwarded-prefix")
                .and_then(|path| prefix(&path))
                .unwrap_or_default(),
            services: None,
            scheme,
        }
    }
}

fn is_services(path: &str) -> bool {
    path.strip_suffix('/').unwrap_or(path) == SERVICES
}

/// What a proxy's header `name` says, if it can stand for a client. A list stands for none:
/// its address counts.
pub fn name(headers: &HeaderMap, name: &str) -> Option<String> {
    if matches!(name, "forwarded" | "x-forwarded-for") {
        return None;
    }
    // What the proxy adds comes after what it was sent.
    let value = headers.get_all(name).iter().next_back()?;
    let value = value.to_str().ok()?.trim();
    let is_sane = (1..=NAME_MAX).contains(&value.len());
    is_sane.then(|| value.to_owned())
}

/// Whose an address is: IPv6 gives everybody as many as they like.
pub fn network(address: IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            format!("{}/64", Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}

/// An IP address with or without port and brackets (RFC 7239 clause 6).
fn address(node: &str) -> Option<IpAddr> {
    let bare = match node.strip_prefix('[') {
        Some(rest) => rest.split(']').next()?,
        None if node.matches(':').count() == 1 => node.split(':').next()?,
        None => node,
    };
    bare.parse().ok()
}

fn scheme(name: &str) -> Option<String> {
    let name = name.trim().to_ascii_lowercase();
    matches!(name.as_str(), "http" | "https").then_some(name)
}

/// A host that is a name, an IPv4 or a bracketed IPv6 address, and perhaps a port.
fn authority(host: &str) -> Option<String> {
    let parsed: Authority = host.trim().parse().ok()?;
    let (name, port) = (parsed.host(), parsed.port_u16());
    let v6 = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'));
    let is_name = |name: &str| {
        !name.is_empty()
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
    };
    match v6 {
        Some(v6) if v6.parse::<std::net::Ipv6Addr>().is_err() => return None,
        None if !is_name(name) => return None,
        _ => {}
    }
    // Userinfo or a port that is none would make the whole longer than its parts.
    let whole = port.map_or_else(|| name.to_owned(), |port| format!("{name}:{port}"));
    (whole == parsed.as_str()).then_some(whole)
}

fn prefix(path: &str) -> Option<String> {
    let path = path.trim().trim_end_matches('/');
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"/-._~%!$&'()*+,;=:@".contains(&b);
    let is_path = path.is_empty() || path.starts_with('/') && !path.starts_with("//");
    (is_path && path.bytes().all(is_plain)).then(|| path.to_owned())
}

fn with_port(host: String, port: Option<&str>, scheme: &str) -> String {
    let has_port = host
        .rsplit_once(':')
        .is_some_and(|(_, port)| !port.contains(']'));
    let default = if scheme == "https" { 443 } else { 80 };
    match port.and_then(|port| port.parse::<u16>().ok()) {
        Some(port) if !has_port && port != default && port != 0 => format!("{host}:{port}"),
        _ => host,
    }
}

/// All lines of a header as one. What is no text makes its own element a bad one.
fn combined(headers: &HeaderMap, name: &str) -> Option<String> {
    let lines = headers.get_all(name).iter();
    let lines: Vec<_> = lines
        .map(|line| String::from_utf8_lossy(line.as_bytes()))
        .collect();
    (!lines.is_empty()).then(|| lines.join(","))
}

fn find<'a>(element: &'a [(String, String)], name: &str) -> Option<&'a str> {
    element
        .iter()
        .find(|(known, _)| known == name)
        .map(|(_, value)| value.as_str())
}

/// The pairs of each element of a `Forwarded` value, names in lower case;
/// None when any part of the value is not RFC 7239 clause 4.
fn parse(value: &str) -> Option<Vec<Vec<(String, String)>>> {
    let mut rest = value;
    let mut elements: Vec<Vec<(String, String)>> = vec![Vec::new()];
    loop {
        rest = rest.trim_start_matches([' ', '\t']);
        if !rest.is_empty() && !rest.starts_with([';', ',']) {
            let (name, after) = token(rest)?;
            let (value, after) = value_of(after.strip_prefix('=')?)?;
            elements
                .last_mut()?
                .push((name.to_ascii_lowercase(), value));
            rest = after.trim_start_matches([' ', '\t']);
        }
        match rest.as_bytes().first() {
            None => {
                elements.retain(|element| !element.is_empty());
                return Some(elements);
            }
            Some(b';') => {}
            Some(b',') => elements.push(Vec::new()),
            Some(_) => return None,
        }
        rest = &rest[1..];
    }
}

fn value_of(text: &str) -> Option<(String, &str)> {
    match text.strip_prefix('"') {
        Some(quoted) => unquote(quoted),
        None => word(text, ":[]").map(|(value, rest)| (value.to_owned(), rest)),
    }
}

fn token(text: &str) -> Option<(&str, &str)> {
    word(text, "")
}

/// A token that may have some more characters: ports and IPv6 addresses ought
/// to be quoted, and many proxies do not.
fn word<'a>(text: &'a str, more: &str) -> Option<(&'a str, &'a str)> {
    let is_token =
        |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c) || more.contains(c);
    let end = text.find(|c| !is_token(c)).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

/// What stands before the closing quote, and what follows it.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(chars.next()?.1),
            c if c.is_control() && c != '\t' => return None,
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in lines {
            let name: hyper::header::HeaderName = name.parse().expect("a name");
            map.append(name, value.parse().expect("a value"));
        }
        map
    }

    fn direct(lines: &[(&str, &str)]) -> Result<String, BadHost> {
        let uri = Uri::from_static("/ows/");
        Base::direct(
            "http",
            &uri,
            Version::HTTP_11,
            &headers(lines),
            "127.0.0.1:1",
        )
        .map(|base| base.with("/ows/"))
    }

    fn proxied(lines: &[(&str, &str)]) -> String {
        behind(1, lines)
    }

    fn behind(proxies: usize, lines: &[(&str, &str)]) -> String {
        let headers = headers(lines);
        let said = Said::new(&headers, proxies);
        inner().behind_proxy(None, "/ows/", said).with("/ows/")
    }

    fn inner() -> Base {
        Base {
            scheme: "http".into(),
            authority: "inner".into(),
            prefix: String::new(),
            services: None,
        }
    }

    #[test]
    fn the_host_is_the_base() {
        for host in [
            "example.org",
            "example.org:8080",
            "127.0.0.1",
            "[::1]",
            "[::1]:8080",
            "a_b-c",
        ] {
            assert_eq!(direct(&[("host", host)]), Ok(format!("http://{host}/ows/")));
        }
    }

    #[test]
    fn a_malformed_host_is_refused() {
        for host in [
            "",
            "a b",
            "user@host",
            "host:",
            "host:99999",
            "host:x",
            "ho/st",
            "host?x",
            "[::1",
            "[x]",
            "a,b",
            "host\"",
            "<script>",
            "a:1:2",
            "h%20",
        ] {
            assert_eq!(direct(&[("host", host)]), Err(BadHost), "{host:?}");
        }
        assert_eq!(direct(&[]), Err(BadHost));
        assert_eq!(direct(&[("host", "a"), ("host", "b")]), Err(BadHost));
    }

    #[test]
    fn http_1_0_may_do_without_a_host() {
        let uri = Uri::from_static("/ows/");
        let base = Base::direct(
            "http",
            &uri,
            Version::HTTP_10,
            &HeaderMap::new(),
            "127.0.0.1:80",
        );
        assert_eq!(base.map(|base| base.authority), Ok("127.0.0.1:80".into()));
    }

    #[test]
    fn a_forwarded_url_is_a_base_to_which_the_path_is_added() {
        let name = "x-forwarded-url";
        assert_eq!(proxied(&[(name, "https://u/base")]), "https://u/base/ows/");
        assert_eq!(
            proxied(&[(name, "https://u:8443/base/")]),
            "https://u:8443/base/ows/"
        );
        let headers = headers(&[(name, "https://u"), ("x-qgis-forwarded-url", "https://v")]);
        let said = Said::new(&headers, 1);
        let base = inner().behind_proxy(Some("https://fixed/x"), "/ows/", said);
        assert_eq!(base.with("/ows/"), "https://fixed/x/ows/");
    }

    #[test]
    fn the_forwarded_url_of_qgis_is_the_address_of_web_services_itself() {
        let of = |said: &str, path: &str| {
            let headers = headers(&[("x-qgis-forwarded-url", said)]);
            let said = Said::new(&headers, 1);
            inner().behind_proxy(None, path, said).with(path)
        };
        for (said, path, address) in [
            ("https://u/maps/ows/", "/ows/", "https://u/maps/ows/"),
            ("https://u/maps/ows/", "/ows", "https://u/maps/ows/"),
            ("https://u/anywhere", "/ows/", "https://u/anywhere"),
            ("https://u", "/ows/", "https://u/"),
            // The same for all requests, and one for each.
            (
                "https://u/maps/ows/",
                "/wfs3/api",
                "https://u/maps/wfs3/api",
            ),
            (
                "https://u/maps/wfs3/api",
                "/wfs3/api",
                "https://u/maps/wfs3/api",
            ),
            ("https://u/maps/ows", "/ows/p/x/", "https://u/maps/ows/p/x/"),
            (
                "https://u/maps/ows/p/x",
                "/ows/p/x/",
                "https://u/maps/ows/p/x/",
            ),
            ("https://u/maps/ows/", "/", "https://u/maps/"),
            ("https://u/maps/", "/", "https://u/maps/"),
            ("https://u/maps", "/wfs3/", "https://u/maps/wfs3/"),
            ("https://u/<x>", "/ows/", "http://inner/ows/"),
        ] {
            assert_eq!(of(said, path), address, "{said} for {path}");
        }
    }

    #[test]
    fn of_a_list_the_word_of_the_outermost_trusted_proxy_counts() {
        let lines = [
            ("x-forwarded-host", "invented, outer:8443, inner"),
            ("x-forwarded-proto", "https, http"),
            ("x-forwarded-prefix", "/gis/, /x"),
        ];
        assert_eq!(behind(1, &lines), "http://inner/x/ows/");
        assert_eq!(behind(2, &lines), "https://outer:8443/gis/ows/");
        let lines = [("x-forwarded-host", "invented"), ("x-forwarded-host", "h")];
        assert_eq!(behind(1, &lines), "http://h/ows/");
    }

    #[test]
    fn a_forwarded_port_is_added_unless_it_is_the_default() {
        let of = |port| {
            proxied(&[
                ("x-forwarded-host", "h"),
                ("x-forwarded-proto", "https"),
                ("x-forwarded-port", port),
            ])
        };
        assert_eq!(of("8443"), "https://h:8443/ows/");
        assert_eq!(of("443"), "https://h/ows/");
        assert_eq!(of("x"), "https://h/ows/");
    }

    #[test]
    fn forwarded_is_read_with_quotes_and_lists() {
        for (value, base) in [
            ("host=h;proto=https", "https://h/ows/"),
            (
                "host=x, for=\"[2001:db8::1]:4711\" ; Host=\"h:8443\"; Proto=HTTPS",
                "https://h:8443/ows/",
            ),
            ("host=\"h\\.org\"", "http://h.org/ows/"),
            ("host=h:81", "http://h:81/ows/"),
            (",, host=h", "http://h/ows/"),
            (";;host=h;", "http://h/ows/"),
        ] {
            assert_eq!(proxied(&[("forwarded", value)]), base, "{value}");
        }
        let lines = [("forwarded", "host=a"), ("forwarded", "host=b")];
        assert_eq!(behind(1, &lines), "http://b/ows/");
        assert_eq!(behind(2, &lines), "http://a/ows/");
    }

    #[test]
    fn what_a_proxy_garbles_is_ignored() {
        for value in [
            "host=\"h",
            "host",
            "host=h x",
            "=h",
            "host=a b=c",
            "host=\"a\"b",
            "host=\"a b\"",
            "host=a@b",
        ] {
            assert_eq!(
                proxied(&[("forwarded", value)]),
                "http://inner/ows/",
                "{value}"
            );
        }
        for (name, value) in [
            ("x-forwarded-host", "a b"),
            ("x-forwarded-host", "<x>"),
            ("x-forwarded-proto", "javascript"),
            ("x-forwarded-url", "ftp://x/"),
            ("x-forwarded-url", "/x"),
            ("x-forwarded-prefix", "//evil"),
            ("x-forwarded-prefix", "x\"y"),
        ] {
            assert_eq!(
                proxied(&[(name, value)]),
                "http://inner/ows/",
                "{name}: {value}"
            );
        }
    }

    #[test]
    fn commas_in_what_a_client_asked_for_do_not_choose_another_site() {
        let url = "https://maps.example.org/gis/ows/?BBOX=1,2,3,4&Z=,https://evil.example/ows/";
        for header in ["x-forwarded-url", "x-qgis-forwarded-url"] {
            let base = behind(1, &[(header, url)]);
            assert!(base.starts_with("https://maps.example.org/gis/"), "{base}");
            let lines = [(header, "https://evil.example/ows/"), (header, url)];
            assert_eq!(behind(1, &lines), base);
        }
    }

    fn client(proxies: usize, lines: &[(&str, &str)]) -> Option<String> {
        let client = Said::new(&headers(lines), proxies).client();
        client.map(|ip| ip.to_string())
    }

    #[test]
    fn the_client_is_who_the_outermost_trusted_proxy_says() {
        let of = |proxies, value| client(proxies, &[("x-forwarded-for", value)]);
        let whole = "198.51.100.7, 192.0.2.1, 10.0.0.1";
        assert_eq!(of(1, whole).as_deref(), Some("10.0.0.1"));
        assert_eq!(of(2, whole).as_deref(), Some("192.0.2.1"));
        assert_eq!(of(9, whole).as_deref(), Some("198.51.100.7"));
        assert_eq!(of(1, "192.0.2.1").as_deref(), Some("192.0.2.1"));
        assert_eq!(of(1, "198.51.100.7, unknown"), None);
        let lines = [
            ("x-forwarded-for", "198.51.100.7"),
            ("x-forwarded-for", "192.0.2.1"),
        ];
        assert_eq!(client(1, &lines).as_deref(), Some("192.0.2.1"));
        let of = |proxies, value| client(proxies, &[("forwarded", value)]);
        let whole = "for=198.51.100.7, for=192.0.2.1:47;proto=https, for=\"[2001:db8::1]:4711\"";
        assert_eq!(of(1, whole).as_deref(), Some("2001:db8::1"));
        assert_eq!(of(2, whole).as_deref(), Some("192.0.2.1"));
        assert_eq!(
            client(1, &[("x-real-ip", "192.0.2.9")]).as_deref(),
            Some("192.0.2.9")
        );
    }

    #[test]
    fn a_header_that_the_proxy_does_not_know_cannot_invent_a_client() {
        let lines = [
            ("forwarded", "for=198.51.100.7"),
            ("x-real-ip", "198.51.100.8"),
            ("x-forwarded-for", "192.0.2.1"),
        ];
        assert_eq!(client(1, &lines).as_deref(), Some("192.0.2.1"));
        let mut garbled = HeaderMap::new();
        let no_text = hyper::header::HeaderValue::from_bytes(b"\xff, 192.0.2.1");
        garbled.insert("x-forwarded-for", no_text.expect("a value"));
        let client = Said::new(&garbled, 1).client();
        assert_eq!(client, Some(IpAddr::from([192, 0, 2, 1])));
    }

    #[test]
    fn a_name_is_what_stands_last_and_a_list_is_none() {
        let lines = [("x-user", "invented"), ("x-user", "ann")];
        assert_eq!(name(&headers(&lines), "x-user").as_deref(), Some("ann"));
        for list in ["forwarded", "x-forwarded-for"] {
            assert_eq!(name(&headers(&[(list, "192.0.2.1")]), list), None);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_value_panics_or_gets_raw_into_the_url(value in "[ -~]*") {
            let Ok(value) = value.parse::<hyper::header::HeaderValue>() else { return Ok(()) };
            for name in ["forwarded", "x-forwarded-host", "x-forwarded-url", "x-qgis-forwarded-url", "x-forwarded-prefix"] {
                let mut map = HeaderMap::new();
                map.insert(name, value.clone());
                for path in ["/", "/ows/"] {
                    let said = Said::new(&map, 1);
                    let url = inner().behind_proxy(None, path, said).with(path);
                    proptest::prop_assert!(url.parse::<Uri>().is_ok(), "{}", url);
                }
            }
        }
    }
}
