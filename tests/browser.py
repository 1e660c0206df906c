"""A headless Chromium by its DevTools pipe: no driver, no port."""

import json
import os
import select
import shutil
import subprocess
import time

NAMES = 'chromium', 'chromium-browser', 'google-chrome'
FLAGS = (
  '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic',
  '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage',
  '--remote-debugging-pipe',
)  # fmt: skip


def find():
  """The path of a Chromium, or None."""
  return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
  """One page. Commands are those of the DevTools protocol; every page error
  is kept in `errors`, every request in `requests`."""

  def __init__(self, profile, wait=60):
    self.errors, self.requests = [], []
    self._wait, self._number, self._buffer = wait, 0, b''
    inward, self._out = os.pipe()
    self._in, outward = os.pipe()
    # the protocol speaks on file descriptors 3 and 4
    self._process = subprocess.Popen(
      ['bash', '-c', f'exec "$@" 3<&{inward} 4>&{outward}', 'bash', find(),
       *FLAGS, f'--user-data-dir={profile}'],
      pass_fds=(inward, outward), stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(inward)
    os.close(outward)
    self._session = None
    page = self('Target.createTarget', url='about:blank')['targetId']
    self._session = self(
      'Target.attachToTarget', targetId=page, flatten=True
    )['sessionId']  # fmt: skip
    for domain in ('Page', 'Runtime', 'Network'):
      self(f'{domain}.enable')

  def __call__(self, method, **params):
    """Sends a command and returns its result."""
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._out, json.dumps(message).encode() + b'\0')
    while True:
      answer = self._read()
      if answer.get('id') == self._number:
        if 'error' in answer:
          raise RuntimeError(f'{method}: {answer["error"]["message"]}')
        return answer['result']

  def _read(self):
    end = time.monotonic() + self._wait
    while b'\0' not in self._buffer:
      ready, _, _ = select.select([self._in], [], [], end - time.monotonic())
      data = os.read(self._in, 1 << 20) if ready else b''
      if not data:
        raise RuntimeError('the browser does not answer')
      self._buffer += data
    line, self._buffer = self._buffer.split(b'\0', 1)
    answer = json.loads(line)
    params = answer.get('params', {})
    if answer.get('method') == 'Runtime.exceptionThrown':
      self.errors.append(params['exceptionDetails']['exception']['description'])
    if answer.get('method') == 'Network.requestWillBeSent':
      self.requests.append(params['request']['url'])
    return answer

  def open(self, url):
    """Loads a page anew, even where only the fragment changes."""
    self('Page.navigate', url='about:blank')
    self('Page.navigate', url=url)
    while self.run('document.readyState') != 'complete' or self.run(
      'location.href'
    ).startswith('about:'):
      time.sleep(0.01)

  def run(self, script):
    """The value of a JavaScript expression."""
    found = self(
      'Runtime.evaluate', expression=script, returnByValue=True,
      awaitPromise=True, userGesture=True,
    )  # fmt: skip
    if 'exceptionDetails' in found:
      raise RuntimeError(found['exceptionDetails']['exception']['description'])
    return found['result'].get('value')

  def press(self, key, text=''):
    """Presses and releases a key, where the focus is."""
    codes = {
      'Tab': 9, 'ArrowLeft': 37, 'ArrowUp': 38, 'ArrowRight': 39,
      'ArrowDown': 40, 'Home': 36, 'End': 35, 'Backspace': 8,
    }  # fmt: skip
    code = {'key': key, 'code': key, 'windowsVirtualKeyCode': codes.get(key, 0)}
    kind = 'keyDown' if text else 'rawKeyDown'
    self('Input.dispatchKeyEvent', type=kind, text=text, **code)
    self('Input.dispatchKeyEvent', type='keyUp', **code)

  def window(self, width, height, *, dark=False, phone=False):
    self(
      'Emulation.setDeviceMetricsOverride', width=width, height=height,
      deviceScaleFactor=2 if phone else 1, mobile=phone,
    )  # fmt: skip
    scheme = {'name': 'prefers-color-scheme', 'value': 'light'}
    self(
      'Emulation.setEmulatedMedia',
      features=[scheme | ({'value': 'dark'} if dark else {})],
    )

  def close(self):
    for end in (self._out, self._in):
      os.close(end)
    try:
      self._process.wait(5)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
