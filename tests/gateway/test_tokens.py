"""JSON Web Tokens: which ones open the door, and the many that do not."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fullpipe.errors import SetupError
from fullpipe.gateway_rules import render
from fullpipe.gateway_settings import GatewayConfig, Jwt, Replica
from tests.gateway.doors import bearer, http1, http2, wait_until

pytestmark = [pytest.mark.gateway, pytest.mark.triton]

READY = "/v2/models/full_pipeline/ready"
SECRET = "a shared secret with 'quotes\" and $signs"
CLAIMS = {"iss": "https://issuer.example/", "aud": "fullpipe", "sub": "bob@example.org"}


def pem(key, is_private=False) -> bytes:
    if is_private:
        return key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


@pytest.fixture(scope="module")
def private_keys():
    return {
        "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "HS256": SECRET,
    }


@pytest.fixture(scope="module")
def doors(open_gateway, private_keys, tmp_path_factory):
    """A gateway for each algorithm."""
    opened = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLPIPE_JWT_SECRET", SECRET)
        for algorithm, key in private_keys.items():
            public = tmp_path_factory.mktemp("issuer") / "public.pem"
            if algorithm != "HS256":
                public.write_bytes(pem(key))
            settings = Jwt(algorithm, CLAIMS["iss"], CLAIMS["aud"], str(public), 100_000, 8)
            opened[algorithm] = open_gateway(jwt=settings)
    return opened


def token(algorithm, key, headers=None, **changes) -> str:
    claims = {**CLAIMS, "exp": int(time.time()) + 300, **changes}
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key, algorithm=algorithm, headers=headers)


def part(document) -> str:
    return base64.urlsafe_b64encode(json.dumps(document).encode()).rstrip(b"=").decode()


ALGORITHMS = ["RS256", "ES256", "HS256"]
NOW = int(time.time())
# Claims, and whether a well signed token with them is let in.
CHANGES = [
    ("as issued", {}, True),
    ("begun", {"nbf": NOW - 60}, True),
    ("further claims", {"scope": "all", "list": [1, {"exp": 1}], "jti": "x"}, True),
    ("numeric subject", {"sub": "7"}, True),
    ("expired", {"exp": NOW - 1}, False),
    ("long expired", {"exp": 1}, False),
    ("expiry of zero", {"exp": 0}, False),
    ("negative expiry", {"exp": -1}, False),
    ("no expiry", {"exp": None}, False),
    ("expiry in words", {"exp": "tomorrow"}, False),
    ("expiry as a list", {"exp": [NOW + 300]}, False),
    ("not yet", {"nbf": NOW + 3600}, False),
    ("other issuer", {"iss": "https://other.example/"}, False),
    ("issuer without slash", {"iss": "https://issuer.example"}, False),
    ("longer issuer", {"iss": "https://issuer.example/x"}, False),
    ("no issuer", {"iss": None}, False),
    ("other audience", {"aud": "other"}, False),
    ("upper case audience", {"aud": "FULLPIPE"}, False),
    ("longer audience", {"aud": "fullpipe-admin"}, False),
    ("no audience", {"aud": None}, False),
    ("no subject", {"sub": None}, False),
    ("empty subject", {"sub": ""}, False),
    ("claims one level down", {"iss": None, "x": CLAIMS}, False),
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("row", CHANGES, ids=[row[0] for row in CHANGES])
def test_claims(doors, private_keys, algorithm, row):
    _, changes, is_let_in = row
    secret = token(algorithm, private_keys[algorithm], **changes)
    answer = http1(doors[algorithm], "GET", READY, bearer(secret))
    assert answer.status == (200 if is_let_in else 401), answer


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tokens_that_are_not_signed_as_they_must_be(doors, private_keys, algorithm):
    good = token(algorithm, private_keys[algorithm])
    head, body, signature = good.split(".")
    claims = {**CLAIMS, "exp": NOW + 300}
    rsa_pem, ec_pem = (pem(private_keys[name]) for name in ("RS256", "ES256"))

    def forged(name: str, key: bytes, alg: str = "HS256") -> str:
        """Signed with what everybody knows, as if it were a shared secret."""
        text = f"{part({'alg': alg, 'typ': 'JWT'})}.{part(claims)}"
        mac = hmac.new(key, text.encode(), hashlib.sha256).digest()
        return f"{text}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"

    strange_rsa = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    refused = {
        "alg none": f"{part({'alg': 'none'})}.{part(claims)}.",
        "alg None with a signature": f"{part({'alg': 'None'})}.{part(claims)}.{signature}",
        "no alg": f"{part({'typ': 'JWT'})}.{part(claims)}.{signature}",
        "no signature": f"{head}.{body}.",
        "two parts": f"{head}.{body}",
        "four parts": f"{good}.x",
        "another body": f"{head}.{part({**claims, 'sub': 'root'})}.{signature}",
        "another head": f"{part({'alg': algorithm, 'kid': '1'})}.{body}.{signature}",
        "signature cut": good[:-4],
        "signature of zeros": f"{head}.{body}.{'A' * 86}",
        "stranger's key": token("RS256", strange_rsa),
        "stranger's curve": token("ES256", ec.generate_private_key(ec.SECP256R1())),
        "stranger's secret": token("HS256", "x" * 40),
        "public RSA key as secret": forged("rsa", rsa_pem),
        "public EC key as secret": forged("ec", ec_pem),
        "public key as secret, named right": forged("rsa", rsa_pem, algorithm),
        "empty secret": forged("empty", b"", algorithm),
        "RS384": token("RS384", private_keys["RS256"]),
        "RS512": token("RS512", private_keys["RS256"]),
        "PS256": token("PS256", private_keys["RS256"]),
        "HS512": token("HS512", SECRET + "x" * 40),
        "not base64": "eyJ!.eyJ!.x",
        "eyJ": "eyJ",
        "dots": "eyJ..",
        "not JSON": f"eyJ.{base64.urlsafe_b64encode(b'no').decode()}.{signature}",
    }
    for other in ALGORITHMS:
        if other != algorithm:
            refused[f"a good {other}"] = token(other, private_keys[other])
    for what, secret in refused.items():
        assert http1(doors[algorithm], "GET", READY, bearer(secret)).status == 401, what
        assert http2(doors[algorithm], "GET", READY, bearer(secret)).status == 401, what
    assert http1(doors[algorithm], "GET", READY, bearer(good)).status == 200
    assert http1(doors[algorithm], "GET", READY, [("X-API-Key", good)]).status == 200


def test_keys_go_on_beside_tokens_and_the_log_names_the_subject(doors, private_keys):
    door = doors["RS256"]
    assert http1(door, "GET", READY, bearer(door.key("carol"))).status == 200
    assert http1(door, "GET", READY, bearer(token("RS256", private_keys["RS256"]))).status == 200
    wait_until(lambda: door.log(key="jwt:bob@example.org"), 20, "no line for the subject")
    assert door.log(key="carol")
    assert "eyJ" not in door.log_path.read_text()


@pytest.mark.parametrize(
    ("jwt_settings", "message"),
    [
        (Jwt("none", "a", "b"), "jwt.algorithm='none', allowed RS256, ES256, HS256"),
        (Jwt("RS256", "", "b"), "jwt.issuer='' needs plain characters"),
        (Jwt("RS256", "a' }", "b"), "needs plain characters"),
        (Jwt("", "a", ""), "jwt.algorithm is empty"),
    ],
)
def test_settings_that_would_leave_the_door_open_are_refused(tmp_path, jwt_settings, message):
    with pytest.raises(SetupError, match=message.replace("'", ".")):
        render(tmp_path, GatewayConfig(replicas=[Replica("a")], jwt=jwt_settings))
