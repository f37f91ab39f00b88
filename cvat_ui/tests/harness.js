// Serves the test page, stands in for CVAT's server between it and the real function, and drives
// headless Chromium. Wants FUNCTION_URL, the address of a running local_server.py, and FRAMES, a
// folder of JPEGs named by their number.

import { createHmac, randomBytes } from 'node:crypto';
import { access, readFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import { join } from 'node:path';
import { chromium } from 'playwright-core';

const HERE = import.meta.dirname;
export const NAME = 'Segment Anything 2: Tracker';
const TYPES = { js: 'text/javascript', css: 'text/css', html: 'text/html' };
const TRACKER = {
    id: 'pth-facebookresearch-sam2-tracker',
    name: NAME,
    kind: 'tracker',
    supportedShapeTypes: ['mask', 'polygon', 'rectangle', 'ellipse'],
};

/** What CVAT's server does with a tracker call; its answers can be interposed. */
class CvatServer {
    #key = randomBytes(16);

    constructor() {
        this.reset();
    }

    reset() {
        this.loggedIn = true;
        this.functions = [TRACKER, { ...TRACKER, id: 'det', name: 'Detector', kind: 'detector' }];
        this.requests = []; // {type, frame, body, answer}, only those the function answered
        this.asked = []; // all of them
        this.lists = 0;
        /** Tests replace this: (request, forward) => {status, body}; null cuts the connection. */
        this.interpose = (_request, forward) => forward();
    }

    list() {
        this.lists += 1;
        return this.loggedIn
            ? { status: 200, body: this.functions } : { status: 401, body: 'log in first' };
    }

    async call(request) {
        this.asked.push(request);
        return this.interpose(request, () => this.#forward(request));
    }

    async #forward(request) {
        const { frame, shapes, states = [] } = request;
        const plain = states.map((state) => this.#unsign(state));
        if (plain.includes(undefined)) {
            return { status: 400, body: 'Invalid or expired tracker state' };
        }
        const image = await readFile(join(process.env.FRAMES, `${String(frame).padStart(5, '0')}.jpg`));
        const response = await fetch(process.env.FUNCTION_URL, {
            method: 'POST',
            headers: { 'Content-Type': 'application/json' },
            body: JSON.stringify({
                image: image.toString('base64'),
                shapes: shapes ?? states.map(() => null),
                states: plain,
            }),
        });
        if (!response.ok) { // CVAT keeps the function's reason to itself
            return { status: response.status, body: `${response.status} Server Error` };
        }
        const answer = await response.json();
        this.requests.push({ ...request, answer: structuredClone(answer) });
        return { status: 200, body: { ...answer, states: answer.states.map((one) => this.#sign(one)) } };
    }

    /** As if 8 hours had passed. */
    expireStates() {
        this.#key = randomBytes(16);
    }

    #sign(state) {
        const text = JSON.stringify(state);
        return `${text}:${createHmac('sha256', this.#key).update(text).digest('base64url')}`;
    }

    #unsign(signed) {
        const text = signed.slice(0, signed.lastIndexOf(':'));
        const state = JSON.parse(text);
        return signed === this.#sign(state) ? state : undefined;
    }

    /** The function's answer for one object, by frame. */
    answers(index = 0) {
        return new Map(this.requests.filter(({ type }) => type === 'track')
            .map(({ frame, answer }) => [frame, answer.shapes[index]]));
    }
}

async function readBody(request) {
    const chunks = [];
    for await (const chunk of request) {
        chunks.push(chunk);
    }
    return JSON.parse(Buffer.concat(chunks).toString());
}

async function serveFile(path, response) {
    response.setHeader('Content-Type', TYPES[path.split('.').pop()] ?? 'image/jpeg');
    response.end(await readFile(path));
}

async function handle(cvat, request, response) {
    const { pathname } = new URL(request.url, 'http://localhost');
    if (pathname.startsWith('/api/lambda/functions')) {
        const answer = request.method === 'POST'
            ? await cvat.call(await readBody(request)) : cvat.list();
        // On a connection that was used before, Chromium would repeat a cut request by itself.
        response.setHeader('Connection', 'close');
        if (!answer) {
            request.socket.destroy();
            return;
        }
        const { status, body } = answer;
        response.writeHead(status).end(status === 200 ? JSON.stringify(body) : body);
    } else if (pathname === '/sam2_tracker_action.js') {
        await serveFile(join(HERE, '..', 'sam2_tracker_action.js'), response);
    } else if (/^\/page\/\w+\.(js|css)$/.test(pathname)) {
        await serveFile(join(HERE, pathname), response);
    } else if (/^\/frames\/\d+\.jpg$/.test(pathname)) {
        await serveFile(join(process.env.FRAMES, pathname.split('/').pop()), response);
    } else { // any route, as CVAT's UI is one page
        await serveFile(join(HERE, 'page', 'index.html'), response);
    }
}

/** Start the page's server and the browser; `close` ends both. */
export async function start() {
    await access('/usr/bin/chromium').catch(() => {
        throw new Error("/usr/bin/chromium is missing: install Debian's package chromium");
    });
    const cvat = new CvatServer();
    const server = createServer((request, response) => {
        handle(cvat, request, response).catch((error) => {
            response.writeHead(599).end(String(error.stack)); // a fault of the harness itself
        });
    });
    await new Promise((resolve) => { server.listen(0, '127.0.0.1', resolve); });
    const address = `http://127.0.0.1:${server.address().port}`;
    const browser = await chromium.launch({
        executablePath: '/usr/bin/chromium',
        args: [
            '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
            '--disable-background-networking', '--disable-component-update', '--disable-sync',
        ],
    });
    return {
        cvat,
        /** Open a page of the site in a browser of its own, and note what its console says. */
        async open(path = '/tasks/4/jobs/4') {
            const context = await browser.newContext({ viewport: { width: 1000, height: 620 } });
            const page = await context.newPage();
            page.said = [];
            page.on('console', (message) => page.said.push(message.text()));
            page.on('pageerror', (error) => page.said.push(`uncaught: ${error}`));
            await page.goto(address + path);
            return page;
        },
        async close() {
            await browser.close();
            server.closeAllConnections();
            await new Promise((resolve) => { server.close(resolve); });
        },
    };
}
