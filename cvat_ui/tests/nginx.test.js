// The snippet under a real nginx, beside a site that is as CVAT UI's own and knows nothing of it:
// the answers with it are compared with those of the same nginx without it.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { copyFile, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { gunzipSync } from 'node:zlib';
import { request as httpRequest } from 'node:http';

const UI = join(import.meta.dirname, '..');
const TAG = '<script defer src="/sam2_tracker_action.js"></script>';
const INDEX = '<!doctype html><html><head><title>CVAT</title></head><body></head></body></html>\n';
const FILES = {
    'index.html': INDEX,
    'assets/app.js': 'const html = "</head>";\n',
    'assets/app.css': '/* </head> */\n',
    'assets/data.json': '{"text": "</head>"}\n',
    'assets/logo.svg': '<svg xmlns="http://www.w3.org/2000/svg"><desc></desc></svg>\n',
    'notes.txt': '</head>\n',
};
/** What matters here of CVAT UI's react_nginx.conf, in its form. */
const site = (port, root) => `
server {
    listen 127.0.0.1:${port};
    root ${root};
    gzip on;
    gzip_types application/javascript text/javascript;
    location / {
        try_files $uri $uri/ /index.html;
        add_header Cache-Control "no-cache, no-store, must-revalidate";
        add_header Pragma "no-cache";
        add_header Cross-Origin-Opener-Policy "same-origin";
        add_header Cross-Origin-Embedder-Policy "credentialless";
        add_header Expires 0;
        add_header X-Frame-Options "deny";
    }
    location /assets {
        expires 1y;
        add_header Cache-Control "public";
        add_header Cross-Origin-Embedder-Policy "require-corp";
        access_log off;
    }
}
`;
const main = (folder) => `
daemon off;
master_process off;
pid ${folder}/nginx.pid;
error_log stderr warn;
events {}
http {
    include /etc/nginx/mime.types;
    default_type application/octet-stream;
    access_log off;
    ${['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi']
        .map((name) => `${name}_temp_path ${folder}/${name};`).join('\n    ')}
    include ${folder}/conf.d/*.conf;
}
`;

let folder;
const servers = [];

async function freePort() {
    const probe = createServer().listen(0, '127.0.0.1');
    await once(probe, 'listening');
    const { port } = probe.address();
    probe.close();
    await once(probe, 'close');
    return port;
}

function get(address, headers = {}) {
    return new Promise((resolve, reject) => {
        httpRequest(address, { headers, agent: false }, async (response) => {
            const chunks = [];
            for await (const chunk of response) {
                chunks.push(chunk);
            }
            resolve({
                status: response.statusCode,
                headers: response.headers,
                body: Buffer.concat(chunks),
            });
        }).on('error', reject).end();
    });
}

/** Start nginx with or without the snippet; return its address when it answers. */
async function startNginx(name, files) {
    const here = join(folder, name);
    await mkdir(join(here, 'conf.d'), { recursive: true });
    const port = await freePort();
    await writeFile(join(here, 'nginx.conf'), main(here));
    await writeFile(join(here, 'conf.d', 'default.conf'), site(port, join(folder, 'html')));
    for (const file of files) {
        await copyFile(join(UI, file), join(here, 'conf.d', file));
    }
    const nginx = spawn('/usr/sbin/nginx', ['-p', here, '-c', join(here, 'nginx.conf')]);
    let said = '';
    nginx.stderr.on('data', (data) => { said += data; });
    nginx.on('error', () => { said += "/usr/sbin/nginx is missing: install Debian's nginx-light"; });
    servers.push(nginx);
    const address = `http://127.0.0.1:${port}`;
    for (;;) {
        const answer = await get(address).catch(() => null);
        if (answer) {
            assert.equal(said, ''); // no warning either
            return address;
        }
        assert.ok(nginx.pid && nginx.exitCode === null, `nginx did not start: ${said}`);
    }
}

let plain;
let filtered;

before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'cvat-ui-nginx-'));
    await mkdir(join(folder, 'html', 'assets'), { recursive: true });
    for (const [path, text] of Object.entries(FILES)) {
        await writeFile(join(folder, 'html', path), text);
    }
    await copyFile(
        join(UI, 'sam2_tracker_action.js'), join(folder, 'html', 'sam2_tracker_action.js'),
    );
    plain = await startNginx('plain', []);
    filtered = await startNginx('filtered', ['sam2_tracker.conf']);
});
after(async () => {
    for (const nginx of servers.filter(({ exitCode, pid }) => pid && exitCode === null)) {
        nginx.kill();
        await once(nginx, 'exit');
    }
    await rm(folder, { recursive: true });
});

/** Headers that do not tell the moment or the length, which a longer page may change. */
function lasting({ date, 'content-length': length, 'transfer-encoding': encoding, ...headers }) {
    return headers;
}

for (const path of ['/', '/index.html', '/tasks/4/jobs/4']) {
    test(`${path}: the tag is before the first </head>, and only there`, async () => {
        const [was, is] = [await get(plain + path), await get(filtered + path)];

        assert.equal(was.body.toString(), INDEX);
        assert.equal(is.body.toString(), INDEX.replace('</head>', `${TAG}</head>`));
        assert.equal(is.status, 200);
        // A browser must not take its copy from before for unchanged: no validators.
        const {
            etag, 'last-modified': modified, 'accept-ranges': ranges, ...kept
        } = lasting(was.headers);
        assert.ok(etag && modified && ranges);
        assert.deepEqual(lasting(is.headers), kept);
        assert.equal(is.headers['cross-origin-embedder-policy'], 'credentialless');
    });
}

test('compressed, the page is the same', async () => {
    const answer = await get(filtered, { 'Accept-Encoding': 'gzip' });

    assert.equal(answer.headers['content-encoding'], 'gzip');
    assert.ok(gunzipSync(answer.body).toString().includes(`${TAG}</head><body>`));
});

for (const path of Object.keys(FILES).filter((name) => name !== 'index.html')) {
    test(`${path} passes through unchanged, headers included`, async () => {
        const [was, is] = [await get(`${plain}/${path}`), await get(`${filtered}/${path}`)];

        assert.equal(is.body.toString(), FILES[path]);
        const [now, then] = [is, was].map(({ headers }) => ({ ...headers, date: '', expires: '' }));
        assert.deepEqual([is.status, now], [was.status, then]);
    });
}

test('the script is served as JavaScript and is not kept by browsers', async () => {
    const answer = await get(`${filtered}/sam2_tracker_action.js`);

    assert.equal(answer.status, 200);
    assert.match(answer.headers['content-type'], /^(application|text)\/javascript$/);
    assert.match(answer.headers['cache-control'], /no-store/);
    assert.deepEqual(answer.body, await readFile(join(UI, 'sam2_tracker_action.js')));
});
