// Registration of the actions: one for each tracker function of the server, as they come and go.

import assert from 'node:assert/strict';
import { after, afterEach, before, beforeEach, test } from 'node:test';
import { NAME, start } from './harness.js';

let site;
let cvat;

before(async () => {
    site = await start();
    cvat = site.cvat;
});
after(() => site.close());
beforeEach(() => cvat.reset());
afterEach(() => site.closePages());

const readPage = (page, name) => page.evaluate((key) => globalThis.testPage[key], name);
const names = (page) => page.evaluate(() => globalThis.testPage.actionNames());
const untilListed = (page, expected) => page.waitForFunction(
    (all) => JSON.stringify(globalThis.testPage.actionNames()) === JSON.stringify(all), expected,
);
/** Go to another address of the one-page UI, and wait for the next list of functions. */
async function navigate(page, path) {
    const requests = await page.evaluate((to) => {
        window.history.pushState(null, '', to);
        return globalThis.testPage.listRequests;
    }, path);
    await page.waitForFunction((count) => globalThis.testPage.listAnswers > count, requests);
}

test('trackers are registered, other functions are not', async () => {
    const page = await site.open();
    await untilListed(page, [NAME]);
});

test('a core that appears after the script is waited for', async () => {
    const page = await site.open('/tasks?core=late');
    await untilListed(page, [NAME]);
});

test('before the login there is no action, and the login page sends no requests', async () => {
    cvat.loggedIn = false;
    const page = await site.open('/auth/login');
    await page.waitForFunction(() => globalThis.testPage.events.length > 5); // address checks
    assert.equal(await readPage(page, 'listRequests'), 0);
    await navigate(page, '/tasks'); // a page that is still open after the session has ended
    assert.deepEqual(await names(page), []);

    cvat.loggedIn = true;
    await navigate(page, '/tasks/4/jobs/4');

    await untilListed(page, [NAME]);
});

test('actions follow the functions of the server; none is registered twice', async () => {
    const [tracker, detector] = cvat.functions;
    const page = await site.open();
    await untilListed(page, [NAME]);
    const toy = { ...tracker, id: 'toy', name: 'Toy tracker' };
    cvat.functions = [tracker, detector, toy];
    await navigate(page, '/tasks/4/jobs/5');
    await untilListed(page, [NAME, 'Toy tracker']);
    await navigate(page, '/tasks/4/jobs/6');
    cvat.functions = [detector, toy];
    await navigate(page, '/tasks/4/jobs/7');
    await untilListed(page, ['Toy tracker']);
    cvat.functions = [tracker, toy];
    await navigate(page, '/tasks/4/jobs/8');
    await untilListed(page, ['Toy tracker', NAME]);

    assert.deepEqual(await readPage(page, 'registrations'), [NAME, 'Toy tracker', NAME]);
    assert.deepEqual(page.consoleTexts, []);
});

test('a newly deployed function appears within a minute on the same page', async () => {
    const [tracker] = cvat.functions;
    const page = await site.open();
    await untilListed(page, [NAME]);
    cvat.functions = [tracker, { ...tracker, id: 'toy', name: 'Toy tracker' }];
    await page.evaluate(() => {
        const now = performance.now.bind(performance);
        performance.now = () => now() + 60_000; // a minute passes
    });

    await untilListed(page, [NAME, 'Toy tracker']);
});

test('the actions stay when listing the functions fails', async () => {
    const page = await site.open();
    await untilListed(page, [NAME]);
    cvat.loggedIn = false;
    await navigate(page, '/tasks/4/jobs/5');
    await navigate(page, '/tasks/4/jobs/6');

    assert.deepEqual(await names(page), [NAME]);
});

test('of two functions with the same name, the second is listed with its id', async () => {
    const [tracker] = cvat.functions;
    cvat.functions = [tracker, { ...tracker, id: 'second' }];
    const page = await site.open();

    await untilListed(page, [NAME, `${NAME} (second)`]);
});

test('a script that is loaded twice registers once', async () => {
    const page = await site.open();
    await page.addScriptTag({ url: '/sam2_tracker_action.js' });
    await untilListed(page, [NAME]);
    await navigate(page, '/tasks/4/jobs/5');
    await navigate(page, '/tasks/4/jobs/6');

    assert.deepEqual(await readPage(page, 'registrations'), [NAME]);
});

for (const kind of ['old', 'none']) {
    test(`without the API (core: ${kind}) the script logs one message and stops`, async () => {
        const page = await site.open(`/tasks?core=${kind}`);
        const isOurs = (text) => text.startsWith('SAM 2 tracker:');
        if (!page.consoleTexts.some(isOurs)) {
            await page.waitForEvent('console', (message) => isOurs(message.text()));
        }

        assert.equal(await readPage(page, 'pendingTimers'), 0); // so nothing can follow
        assert.equal(await readPage(page, 'listRequests'), 0);
        assert.deepEqual(page.consoleTexts.filter(isOurs), [
            'SAM 2 tracker: this page has no CVAT with annotation actions; nothing was added.',
        ]);
    });
}
