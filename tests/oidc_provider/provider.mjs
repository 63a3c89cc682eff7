// A certified OpenID Connect provider (npm `oidc-provider`) for the tests.
//
//   node provider.mjs PORT CLIENTS_JSON [ask]
//
// Who comes to sign in is signed in as `ada`, without a page; with `ask` a page asks for the name,
// and believes it. The signing keys can be rotated by POST /-/rotate. It speaks plain HTTP and
// keeps everything in memory.

import { generateKeyPairSync, randomBytes } from 'node:crypto';
import { createServer } from 'node:http';
import Provider from 'oidc-provider';

const [port, clients] = [Number(process.argv[2]), JSON.parse(process.argv[3])];
const asks = process.argv[4] === 'ask';
const ISSUER = `http://127.0.0.1:${port}`;
const AUDIENCE = 'comp-ai-service';
const SCOPES = 'comp-ai:user comp-ai:auditor';
// By resource (RFC 8707): the form of its tokens and their audience.
const RESOURCES = {
  'urn:comp-ai:signed': { accessTokenFormat: 'jwt', audience: AUDIENCE },
  'urn:comp-ai:opaque': { accessTokenFormat: 'opaque', audience: AUDIENCE },
  'urn:elsewhere': { accessTokenFormat: 'jwt', audience: 'elsewhere' },
};
const GROUPS = { ada: ['lab', 'trial'], root: ['lab', 'staff/admins'] };
const PAGE = `<!doctype html><title>Sign in</title><form method="post">
<label>Name <input name="login" autofocus></label> <button>Sign in</button></form>`;
const COOKIE_KEY = randomBytes(32).toString('hex');

const keys = [];
let provider;

function rotate() {
  const { privateKey } = generateKeyPairSync('rsa', { modulusLength: 2048 });
  const kid = randomBytes(8).toString('hex');
  // The first one signs; the older ones stay published.
  keys.unshift({ ...privateKey.export({ format: 'jwk' }), kid, use: 'sig', alg: 'RS256' });
  // A provider does not change its keys. What it remembers is kept by the package, for all.
  provider = create();
  return kid;
}

function create() {
  return new Provider(ISSUER, {
    clients,
    jwks: { keys: structuredClone(keys) },
    cookies: { keys: [COOKIE_KEY] },
    scopes: ['openid', 'offline_access', ...SCOPES.split(' ')],
    pkce: { required: () => true },
    rotateRefreshToken: true,
    issueRefreshToken: (ctx, client) => client.grantTypeAllowed('refresh_token'),
    expiresWithSession: () => true,
    findAccount: (ctx, id) => ({ accountId: id, claims: () => ({ sub: id, groups: GROUPS[id] ?? [] }) }),
    // As oauth2-proxy and the gateway want them: in the ID token and in a signed access token.
    claims: { openid: ['sub', 'groups'] },
    conformIdTokenClaims: false,
    extraTokenClaims: (ctx, token) => (token.accountId ? { groups: GROUPS[token.accountId] ?? [] } : {}),
    interactions: { url: (ctx, interaction) => `/interaction/${interaction.uid}` },
    loadExistingGrant: grantWhatIsAsked,
    ttl: { AccessToken: 300, ClientCredentials: 300, RefreshToken: 3600, IdToken: 300, Session: 3600, Grant: 3600, Interaction: 300 },
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      introspection: { enabled: true },
      revocation: { enabled: true },
      rpInitiatedLogout: { enabled: true },
      resourceIndicators: {
        enabled: true,
        defaultResource: (ctx, client, oneOf) => oneOf ?? 'urn:comp-ai:signed',
        useGrantedResource: () => true,
        getResourceServerInfo: (ctx, resource) => ({ scope: SCOPES, ...RESOURCES[resource] }),
      },
    },
  });
}

async function grantWhatIsAsked(ctx) {
  const { client, session, params } = ctx.oidc;
  const grant = new ctx.oidc.provider.Grant({
    clientId: client.clientId,
    accountId: session.accountId,
  });
  grant.addOIDCScope(`openid offline_access ${SCOPES}`);
  for (const resource of [params.resource ?? 'urn:comp-ai:signed'].flat()) {
    grant.addResourceScope(resource, SCOPES);
  }
  await grant.save();
  return grant;
}

async function interact(request, response) {
  if (asks && request.method === 'GET') {
    response.setHeader('content-type', 'text/html');
    return response.end(PAGE);
  }
  const accountId = asks ? (await form(request)).get('login') : 'ada';
  return provider.interactionFinished(request, response, { login: { accountId } });
}

async function form(request) {
  let text = '';
  for await (const part of request) text += part;
  return new URLSearchParams(text);
}

async function answer(request, response) {
  if (request.method === 'POST' && request.url === '/-/rotate') {
    response.end(rotate());
  } else if (request.url.startsWith('/interaction/')) {
    await interact(request, response);
  } else {
    await provider.callback()(request, response);
  }
}

rotate();
createServer((request, response) => {
  answer(request, response).catch((error) => {
    console.error(error);
    response.writeHead(500).end();
  });
}).listen(port, '127.0.0.1');
